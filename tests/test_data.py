"""Images and numbers of all kinds: properties that hold for every draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from edge_dfcil import RECIPES, Cancelled, DataError, metrics
from edge_dfcil.model.inputs import check_images
from edge_dfcil.model.network import Network
from edge_dfcil.model.preprocessing import fit
from edge_dfcil.training.augment import augment, crop, jitter
from edge_dfcil.training.data import RealBatches, scan

PLAIN = RECIPES["edge"].changed(
    {"augmentation.brightness": 0.0, "augmentation.contrast": 0.0, "augmentation.flip": False, "augmentation.crop_padding": 0}
)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 70), st.integers(8, 70), st.integers(8, 40), st.booleans())
def test_fit_gives_the_square_asked_for_within_the_old_range(height: int, width: int, size: int, whole: bool) -> None:
    images = torch.rand(2, 3, height, width)
    images = (images * 255).to(torch.uint8) if whole else images
    out = fit(images, size)
    assert out.shape == (2, 3, size, size)
    assert out.dtype == images.dtype
    assert out.float().min() >= images.float().min() - 1
    assert out.float().max() <= images.float().max() + 1


def test_fit_keeps_the_centre() -> None:
    wide = torch.zeros(1, 3, 16, 48)
    wide[..., 16:32] = 1
    assert fit(wide, 16).min() == 1


@given(st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]))
def test_every_float_kind_is_an_image(dtype: Any) -> None:
    kept = torch.float32 if dtype == torch.float64 else dtype  # MPS has no float64
    assert check_images(torch.full((1, 3, 8, 8), 0.5, dtype=dtype)).dtype == kept


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_jitter_stays_in_range_and_differs_by_image(seed: int, brightness: float, contrast: float) -> None:
    torch.manual_seed(seed)
    images = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    out = jitter(images, brightness, contrast)
    assert out.min() >= 0
    assert out.max() <= 1
    if contrast > 0.3:
        assert not torch.equal(out[0], out[1])


def test_jitter_by_hand_for_a_grey_image() -> None:
    """Contrast does not change a flat grey image, so that only brightness acts."""
    torch.manual_seed(0)
    out = jitter(torch.full((200, 3, 4, 4), 0.5), 0.2, 0.9)
    assert out.std((1, 2, 3)).max() < 1e-6
    assert 0.4 <= out.min() < 0.41
    assert 0.59 < out.max() <= 0.6


def test_crop_moves_pixels_and_pads_with_zeros() -> None:
    torch.manual_seed(0)
    images = torch.ones(64, 3, 8, 8)
    out = crop(images, 2)
    assert out.shape == images.shape
    assert set(out.unique().tolist()) == {0.0, 1.0}
    kept = out[:, 0].sum((1, 2))
    assert kept.min() == 36, "a corner crop keeps 6 x 6"
    assert kept.max() == 64, "a centre crop keeps all"


def test_crop_keeps_channels_together() -> None:
    torch.manual_seed(0)
    image = torch.stack([torch.full((8, 8), 0.1), torch.full((8, 8), 0.2), torch.full((8, 8), 0.3)])[None]
    out = crop(image, 2)
    inside = out[0, 0] > 0
    assert torch.allclose(out[0, :, inside], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(-1, int(inside.sum())))


def test_nothing_asked_for_is_nothing_done() -> None:
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(augment(images, PLAIN), images)
    flipped = augment(images[:1].expand(40, -1, -1, -1), PLAIN.changed({"augmentation.flip": True}))
    same = (flipped == images[0]).flatten(1).all(1)
    assert torch.equal(flipped[~same][0], images[0].flip(2))
    assert 5 < same.sum() < 35


def test_scan_counts_images_and_batches() -> None:
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 5])), (torch.rand(2, 3, 8, 8), [5, 5])]
    scanned = scan(batches)
    assert scanned.counts == {0: 2, 1: 1, 5: 3}
    assert scanned.images == 6
    assert scanned.batch_sizes == {4: 1, 2: 1}
    assert scanned.counts_by_size == {4: {0: 2, 1: 1, 5: 1}, 2: {5: 2}}


def test_scan_of_a_loader_without_end_can_be_cancelled() -> None:
    batch = (torch.rand(4, 3, 8, 8), [0, 0, 1, 1])

    class Endless:
        read = 0

        def __iter__(self) -> Iterator[Any]:
            while True:
                self.read += 1
                yield batch

    endless = Endless()
    with pytest.raises(Cancelled, match="first time"):
        scan(endless, lambda: endless.read >= 5)
    assert endless.read == 5


class TestHeldOut:
    RECIPE = PLAIN.changed({"refine.calibrate": True, "refine.held_out": 0.25})

    @settings(deadline=None, max_examples=25)
    @given(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]), st.integers(2, 40), st.integers(0, 2**31))
    def test_what_is_held_out_is_never_trained_on_in_any_order(self, dtype: Any, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        images = torch.randint(0, 256, (80, 3, 8, 8), dtype=torch.uint8)
        images = images if dtype == torch.uint8 else (images / 255).to(dtype)
        loader = DataLoader(TensorDataset(images, torch.arange(80) % 2), batch_size=batch, shuffle=True)
        batches = real_batches(loader, self.RECIPE)
        held, seen = set[str](), set[str]()
        for _ in range(2):
            for part in batches.plain():
                held |= {str(image.tolist()) for image in part.source[batches.held_out(part)]}
        assert 3 < len(held) < 40
        for _ in range(2):
            for part in batches:
                assert len(part.source) == len(part.targets)
                seen |= {str(image.tolist()) for image in part.source}
        if min(batch, 80 % batch or batch) > 10:  # a smaller batch may consist of held-out images only, and is then used
            assert not seen & held

    def test_a_class_of_few_images_is_trained_on_whole(self) -> None:
        images = torch.randint(0, 256, (43, 3, 8, 8), dtype=torch.uint8)
        targets = torch.tensor([0] * 40 + [1] * 3)
        batches = real_batches([(images, targets)], self.RECIPE)
        (part,) = batches.plain()
        assert batches.held_out(part)[:40].any() and not batches.held_out(part)[40:].any()
        (trained,) = batches
        assert int((trained.targets == 1).sum()) >= 3

    def test_nothing_is_held_out_where_nothing_is_calibrated(self) -> None:
        images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
        batches = real_batches([(images, torch.arange(40) % 2)], self.RECIPE.changed({"refine.calibrate": False}))
        (part,) = batches
        assert torch.equal(part.source, images) and not batches.held_out(part).any()


def real_batches(loader: Any, recipe: Any = PLAIN, names: Any = None) -> RealBatches:
    scanned = scan(loader)
    network = Network(torch.nn.Flatten(), 192, 8).grown(2)
    return RealBatches(loader, scanned, {0: 0, 1: 1}, network, recipe, names)


def batches_of(*sizes: Any, target: Any = lambda batch, image: image % 2) -> Any:
    return [(torch.rand(n, 3, 8, 8), [target(batch, image) for image in range(n)]) for batch, n in enumerate(sizes)]


class TestLeftOut:
    PAPER = PLAIN.changed({"schedule.drop_incomplete": True})

    @pytest.mark.parametrize(("recipe", "sizes", "left_out"), [(PLAIN, (4, 3, 1), 1), (PAPER, (4, 3, 1), 4), (PAPER, (4, 3), 3)])
    def test_images_that_no_epoch_sees_are_counted_and_mentioned(
        self, recipe: Any, sizes: tuple[Any, ...], left_out: int
    ) -> None:
        with pytest.warns(UserWarning, match=f"{left_out} of {sum(sizes)} images are left out"):
            batches = real_batches(batches_of(*sizes), recipe)
        assert batches.left_out == left_out
        assert sum(len(batch) for batch in batches) == sum(sizes) - left_out

    @pytest.mark.parametrize(("recipe", "sizes"), [(PLAIN, (4, 3)), (PAPER, (4, 4)), (PAPER, (3,))])
    def test_nothing_is_said_where_all_are_seen(self, recipe: Any, sizes: tuple[Any, ...]) -> None:
        assert real_batches(batches_of(*sizes), recipe).left_out == 0

    def test_a_class_that_would_never_be_learnt_is_refused(self) -> None:
        alone = batches_of(4, 1, target=lambda batch, image: batch)
        with pytest.raises(DataError, match=r"no image of 'dog' would be learnt from.*alone in a batch"):
            real_batches(alone, names={0: "cat", 1: "dog"})
        few = batches_of(4, 3, target=lambda batch, image: batch)
        with pytest.raises(DataError, match=r"no image of target 1 .*drop_incomplete to False"):
            real_batches(few, self.PAPER)
        assert real_batches(few).left_out == 0

    def test_a_class_left_out_by_chance_is_not_refused(self) -> None:
        class Shuffled:
            passes = 0

            def __iter__(self) -> Any:
                self.passes += 1
                return iter(batches_of(4, 1, target=lambda batch, image: (batch == 1) if self.passes == 1 else image % 2))

        with pytest.warns(UserWarning, match="unless the loader shuffles"):
            assert real_batches(Shuffled()).left_out == 1

    def test_a_loader_known_to_shuffle_is_not_warned_of(self) -> None:
        data = TensorDataset(torch.rand(9, 3, 8, 8), torch.arange(9) % 2)
        assert real_batches(DataLoader(data, batch_size=4, shuffle=True)).left_out == 1


def test_metrics_by_hand() -> None:
    assert metrics.average_incremental_accuracy([0.9, 0.5]) == pytest.approx(0.7)
    assert metrics.forgetting([[0.9], [0.5, 0.8], [0.6, 0.4, 0.9]]) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert metrics.forgetting([[0.9]]) == 0
    assert metrics.omega([0.9, 0.4], [0.9, 0.8]) == pytest.approx(75)


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=4, max_size=4).filter(lambda m: sum(map(sum, m))))
def test_evaluation_adds_up(confusion: Any) -> None:
    found = metrics.evaluation(confusion, list("abcd"), [("a", "b"), ("c", "d")])
    assert 0 <= found.accuracy <= 1
    assert found.n == sum(map(sum, confusion))
    assert found.macro_accuracy == pytest.approx(sum(found.per_class.values()) / len(found.per_class))
    weighted = sum(accuracy * sum(confusion["abcd".index(name)]) for name, accuracy in found.per_class.items())
    assert weighted / found.n == pytest.approx(found.accuracy)


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        metrics.evaluation([[0, 0], [0, 0]], "ab", [("a", "b")])
