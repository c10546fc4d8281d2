"""Images and numbers of all kinds: properties that hold for every draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dfcil import RECIPES, metrics
from edge_dfcil.model.inputs import check_images
from edge_dfcil.model.preprocessing import fit
from edge_dfcil.training.augment import augment, crop, jitter
from edge_dfcil.training.data import scan

PLAIN = RECIPES["edge"].changed(
    {"augmentation.brightness": 0.0, "augmentation.contrast": 0.0, "augmentation.flip": False, "augmentation.crop_padding": 0}
)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 70), st.integers(8, 70), st.integers(8, 40), st.booleans())
def test_fit_gives_the_square_asked_for_within_the_old_range(height, width, size, whole):
    images = torch.rand(2, 3, height, width)
    images = (images * 255).to(torch.uint8) if whole else images
    out = fit(images, size)
    assert out.shape == (2, 3, size, size)
    assert out.dtype == images.dtype
    assert out.float().min() >= images.float().min() - 1
    assert out.float().max() <= images.float().max() + 1


def test_fit_keeps_the_centre():
    wide = torch.zeros(1, 3, 16, 48)
    wide[..., 16:32] = 1
    assert fit(wide, 16).min() == 1


@given(st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]))
def test_every_float_kind_is_an_image(dtype):
    assert check_images(torch.full((1, 3, 8, 8), 0.5, dtype=dtype)).dtype == dtype


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_jitter_stays_in_range_and_differs_by_image(seed, brightness, contrast):
    torch.manual_seed(seed)
    images = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    out = jitter(images, brightness, contrast)
    assert out.min() >= 0
    assert out.max() <= 1
    if contrast > 0.3:
        assert not torch.equal(out[0], out[1])


def test_jitter_by_hand_for_a_grey_image():
    """Contrast leaves one flat grey alone, so that brightness is all there is."""
    torch.manual_seed(0)
    out = jitter(torch.full((200, 3, 4, 4), 0.5), 0.2, 0.9)
    assert out.std((1, 2, 3)).max() < 1e-6
    assert 0.4 <= out.min() < 0.41
    assert 0.59 < out.max() <= 0.6


def test_crop_moves_pixels_and_pads_with_zeros():
    torch.manual_seed(0)
    images = torch.ones(64, 3, 8, 8)
    out = crop(images, 2)
    assert out.shape == images.shape
    assert set(out.unique().tolist()) == {0.0, 1.0}
    kept = out[:, 0].sum((1, 2))
    assert kept.min() == 36, "a corner crop keeps 6 x 6"
    assert kept.max() == 64, "a centre crop keeps all"


def test_crop_keeps_channels_together():
    torch.manual_seed(0)
    image = torch.stack([torch.full((8, 8), 0.1), torch.full((8, 8), 0.2), torch.full((8, 8), 0.3)])[None]
    out = crop(image, 2)
    inside = out[0, 0] > 0
    assert torch.allclose(out[0, :, inside], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(-1, int(inside.sum())))


def test_nothing_asked_for_is_nothing_done():
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(augment(images, PLAIN), images)
    flipped = augment(images[:1].expand(40, -1, -1, -1), PLAIN.changed({"augmentation.flip": True}))
    same = (flipped == images[0]).flatten(1).all(1)
    assert torch.equal(flipped[~same][0], images[0].flip(2))
    assert 5 < same.sum() < 35


def test_scan_counts_images_and_batches():
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 5])), (torch.rand(2, 3, 8, 8), [5, 5])]
    scanned = scan(batches)
    assert scanned.counts == {0: 2, 1: 1, 5: 3}
    assert scanned.images == 6
    assert scanned.batch_sizes == {4: 1, 2: 1}


def test_metrics_by_hand():
    assert metrics.average_incremental_accuracy([0.9, 0.5]) == pytest.approx(0.7)
    assert metrics.forgetting([[0.9], [0.5, 0.8], [0.6, 0.4, 0.9]]) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert metrics.forgetting([[0.9]]) == 0
    assert metrics.omega([0.9, 0.4], [0.9, 0.8]) == pytest.approx(75)


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=4, max_size=4).filter(lambda m: sum(map(sum, m))))
def test_evaluation_adds_up(confusion):
    found = metrics.evaluation(confusion, list("abcd"), [("a", "b"), ("c", "d")])
    assert 0 <= found.accuracy <= 1
    assert found.n == sum(map(sum, confusion))
    weighted = sum(accuracy * sum(confusion["abcd".index(name)]) for name, accuracy in found.per_class.items())
    assert weighted / found.n == pytest.approx(found.accuracy)
