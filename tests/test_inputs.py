"""Images, targets and loaders of every kind that users have: each is accepted, or refused with an error that says what to do."""

from __future__ import annotations

import enum
import os
import signal
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from edge_dfcil import DataError, EdgeDfcilError
from edge_dfcil.model.inputs import AT_ONCE, as_images, check_images, check_targets, read
from edge_dfcil.model.pictures import read_pictures

X = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0])


class TestImages:
    def test_what_networks_cannot_take_as_it_is(self) -> None:
        floats = X.float() / 255
        assert check_images(floats.double()).dtype == torch.float32
        assert not check_images(floats.clone().requires_grad_()).requires_grad
        assert torch.equal(check_images(floats.to_sparse()), floats)
        assert torch.equal(check_images(X.permute(0, 1, 3, 2)), X.permute(0, 1, 3, 2))
        assert torch.equal(check_images(list(X)), X)
        assert check_images(X[:0]).shape == (0, 3, 16, 16)

    def test_arrays_that_torch_does_not_take(self) -> None:
        floats = X.numpy() / np.float64(255)
        wanted = check_images(floats)
        frozen = X.numpy().copy()
        frozen.flags.writeable = False
        assert torch.equal(check_images(frozen), X), "and torch gives no warning"
        for array in (
            floats.astype(">f8"),
            floats.astype(np.longdouble),
            np.asfortranarray(floats),
            floats[:, :, ::-1][:, :, ::-1],
        ):
            assert torch.equal(check_images(array), wanted)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (X.to("meta"), "meta"),
            (X.long(), r"torch.int64.*\.to\(torch\.uint8\)"),
            (X > 3, "torch.bool"),
            (X.to(torch.complex64), "complex64"),
            (np.array(["a", "b"]), "dtype <U1"),
            (np.array([object()]), "dtype object"),
            ([X[0], X[0, :, :8]], "different shapes"),
            ("cat.png", "got a str"),
            (None, "NoneType"),
            (X[0], r"images\[None\]"),
            (X[:, :, :0], "at least one pixel"),
            (torch.rand(2, 4, 8, 8), "transparency"),
            (torch.nested.nested_tensor([torch.rand(3, 8, 8)], layout=torch.jagged), "nested"),
        ],
    )
    def test_what_is_refused(self, images: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            check_images(images)


class Fruit(enum.IntEnum):
    APPLE = 1


class TestTargets:
    @pytest.mark.parametrize(
        "targets",
        [
            Y,
            Y.to(torch.uint8),
            Y.bool(),
            Y.numpy(),
            Y.numpy().astype(object),
            Y.tolist(),
            tuple(Y.tolist()),
            list(Y),
            [np.int64(value) for value in Y],
            [np.bool_(value) for value in Y],
            [np.array(int(value)) for value in Y],
            Y.to_sparse(),
            [0, Fruit.APPLE, True, False],
        ],
    )
    def test_whole_numbers_of_any_kind_are_plain_ones(self, targets: Any) -> None:
        found = check_targets(targets, 4, "batch 1")
        assert found == [0, 1, 1, 0]
        assert {type(value) for value in found} == {int}

    def test_names_and_single_values(self) -> None:
        assert check_targets(np.array(["a", "b"]), 2, "") == check_targets(("a", "b"), 2, "") == ["a", "b"]
        assert check_targets(torch.tensor(3), 1, "") == check_targets(np.int64(3), 1, "") == check_targets(3, 1, "") == [3]
        assert check_targets("cat", 1, "") == ["cat"]

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.nn.functional.one_hot(Y, 3), r"argmax\(1\)"),
            (torch.nn.functional.one_hot(Y, 3).float(), r"argmax\(1\)"),
            (torch.nn.functional.one_hot(Y, 3).tolist(), "argmax"),
            (Y[:, None], r"squeeze\(1\)"),
            (Y[:, None].tolist(), "squeeze"),
            (list(Y[:, None]), "squeeze"),
            (Y.float(), r"\.long\(\)"),
            (Y.numpy().astype(float), r"\.long\(\)"),
            ([*Y.tolist()[:3], 0.5], r"image 3 is 0\.5.*int\(target\)"),
            (Y.to(torch.complex64), "complex"),
            ([0, 1, 1, 1j], "image 3 is 1j"),
            ([0, None, 1, 1], "image 1 is None"),
            ([0, b"a", 1, 1], "decode"),
            ([0, {"a": 1}, 1, 1], "image 1 is"),
            (torch.zeros(4, 8, 8).long(), "masks and boxes"),
            (torch.tensor(3), "not enough"),
            (None, "NoneType"),
            ("abcd", "type str"),
            ({0: 1}, "type dict"),
            (Y[:3], "4 images with 3 targets"),
            (Y.to("meta"), "meta"),
        ],
    )
    def test_what_is_refused_says_what_to_do(self, targets: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            check_targets(targets, 4, "batch 1")

    @settings(deadline=None, max_examples=20)
    @given(
        st.one_of(
            hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
            st.lists(
                st.one_of(st.integers(), st.none(), st.text(), st.floats(), st.binary(), st.lists(st.integers())), max_size=3
            ),
        )
    )
    def test_anything_is_a_list_of_numbers_and_names_or_a_data_error(self, targets: Any) -> None:
        try:
            found = check_targets(targets, 2, "batch 1")
        except DataError:
            return
        assert len(found) == 2
        assert all(type(value) in (int, str) for value in found)


class TestLoaders:
    @pytest.mark.parametrize(
        "batch",
        [
            (X, Y),
            [X, Y],
            (X, Y, torch.arange(4), "more"),
            {"image": X, "label": Y},
            {"pixel_values": X, "labels": Y, "attention_mask": None},
            UserDict(images=list(X), targets=Y.tolist()),
        ],
    )
    def test_batches_of_every_kind(self, batch: Any) -> None:
        ((images, targets),) = read([batch])
        assert torch.equal(images, X)
        assert targets == Y.tolist()

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"picture": X, "label": Y}, "batch 1: got a dict with the keys picture, label; one of image"),
            ({"image": X}, "one of label, labels"),
            (X, "must be a pair"),
            ((X,), "must be a pair"),
        ],
    )
    def test_batches_that_cannot_be_learnt_from(self, batch: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            list(read([batch]))

    @pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), Image.new("RGB", (8, 8))])
    def test_a_data_set_in_place_of_its_loader(self, image: Any) -> None:
        class Some(Dataset[Any]):
            def __getitem__(self, index: int) -> Any:
                return image, 0

        with pytest.raises(DataError, match=r"Some is a data set.*DataLoader\(dataset, batch_size=32"):
            next(read(Some()))
        with pytest.raises(DataError, match=r"single image needs a batch dimension"):
            next(read([(torch.zeros(3, 8, 8), 0)]))

    @pytest.mark.slow
    def test_a_worker_that_dies_is_no_error_of_the_data_set(self) -> None:
        class Dies(Dataset[Any]):
            def __len__(self) -> int:
                return 4

            def __getitem__(self, index: int) -> Any:
                if torch.utils.data.get_worker_info() is not None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return X[0], 0

        with pytest.raises(DataError, match=r"a worker process of the loader died at batch 1.*num_workers=0"):
            next(read(DataLoader(Dies(), 2, num_workers=1)))
        assert len(list(read(DataLoader(Dies(), 2)))) == 2

    def test_the_loader_s_own_error_passes_with_a_note(self) -> None:
        def broken() -> Iterator[Any]:
            yield X, Y
            raise OSError("no such disk")

        with pytest.raises(OSError, match="no such disk") as error:
            list(read(broken()))
        assert str(error.value) == "no such disk"
        if sys.version_info >= (3, 11):
            assert error.value.__notes__ == ["the loader raised this at batch 2; the model is unchanged"]


def images_of(images: Any, size: int = 16) -> Tensor:
    return torch.cat(list(as_images(images, size)))


class TestAsImages:
    @pytest.mark.parametrize(
        "images",
        [
            X,
            X.numpy(),
            X.permute(0, 2, 3, 1),
            X.permute(0, 2, 3, 1).numpy(),
            list(X),
            [image.numpy() for image in X],
            [image.permute(1, 2, 0).numpy() for image in X],
            [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in X],
            [X[0], Image.fromarray(X[1].permute(1, 2, 0).numpy()), X[2].numpy(), X[3].permute(1, 2, 0)],
            {"pixel_values": X},
            [X[:3], X[3:]],
            [(X[:1], Y[:1]), (X[1:], Y[1:], "more")],
            [{"image": X, "label": Y}],
            DataLoader(TensorDataset(X, Y), batch_size=3),
            DataLoader(TensorDataset(X), batch_size=3),
            TensorDataset(X, Y),
            (image for image in X),
        ],
        ids=lambda images: type(images).__name__,
    )
    def test_the_same_images_in_every_form(self, images: Any) -> None:
        found = images_of(images)
        assert found.dtype == torch.uint8
        assert torch.equal(found, X)

    @pytest.mark.parametrize("image", [X[0], X[0].permute(1, 2, 0), X[0].numpy(), Image.fromarray(X[0].permute(1, 2, 0).numpy())])
    def test_a_single_image(self, image: Any) -> None:
        assert torch.equal(images_of(image), X[:1])

    @pytest.mark.parametrize("grey", [X[0, 0], X[0, :1], X[0, :1].permute(1, 2, 0), X[:1, :1], X[:1, :1].permute(0, 2, 3, 1)])
    def test_grey_is_made_threefold(self, grey: Any) -> None:
        assert torch.equal(images_of(grey), X[:1, :1].expand(-1, 3, -1, -1))

    def test_channels_first_where_both_could_be_meant(self) -> None:
        square = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
        assert torch.equal(images_of(square, 3)[0], square)

    def test_paths_and_pictures_are_read_as_one(self, tmp_path: Path) -> None:
        paths = []
        for i, size in enumerate([(40, 24), (16, 16), (9, 31)]):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
            paths.append(tmp_path / f"{i}.png")
            Image.fromarray(pixels).save(paths[-1])
        wanted = read_pictures(paths, 16)
        assert torch.equal(images_of(paths), wanted)
        assert torch.equal(images_of([str(path) for path in paths]), wanted)
        assert torch.equal(images_of(np.array([str(path) for path in paths])), wanted)
        assert torch.equal(images_of([Image.open(path) for path in paths]), wanted)
        assert torch.equal(images_of(paths[0]), wanted[:1])

    def test_batches_keep_their_size_and_single_ones_are_fitted(self) -> None:
        large = torch.rand(2, 3, 40, 24)
        assert [batch.shape for batch in as_images(large, 16)] == [(2, 3, 40, 24)]
        assert [batch.shape for batch in as_images(list(large), 16)] == [(2, 3, 16, 16)]

    def test_kinds_and_orders_are_kept_apart(self) -> None:
        batches = list(as_images([X[0], X[1].float() / 255, X[2], X[2:], X[3]], 16))
        assert [(len(batch), batch.dtype) for batch in batches] == [
            (1, torch.uint8),
            (1, torch.float32),
            (1, torch.uint8),
            (2, torch.uint8),
            (1, torch.uint8),
        ]

    @pytest.mark.parametrize("many", [torch.zeros(600, 3, 8, 8), [torch.zeros(3, 8, 8)] * 600])
    def test_never_more_than_so_many_at_once(self, many: Any) -> None:
        sizes = [len(batch) for batch in as_images(many, 8)]
        assert sum(sizes) == 600
        assert max(sizes) == AT_ONCE

    def test_nothing_gives_nothing(self) -> None:
        assert list(as_images([], 16)) == []
        assert sum(len(batch) for batch in as_images(X[:0], 16)) == 0

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (None, "NoneType"),
            (7, "got a int"),
            ({X}, "got a set"),
            (b"png", "got a bytes"),
            (object(), "cannot be iterated"),
            ("nowhere.png", r"nowhere\.png"),
            ([X[0], "nowhere.png"], r"image 1: nowhere\.png"),
            ([X[0], None], "image 1: got a NoneType"),
            ([X[0], X[1].float()], "image 1: pixels reach"),
            ([X, Y], "image 1: the shape is .* looks like targets"),
            (torch.zeros(5, 16, 16), r"\(N, 1, H, W\)"),
            (torch.zeros(2, 4, 16, 16), "transparency"),
            (torch.zeros(2, 2, 2, 2, 2), "shape"),
            (torch.tensor(1.0), "shape"),
            ({"label": Y}, "one of image"),
            ([{"label": Y}], "image 0: got a dict"),
        ],
    )
    def test_what_is_refused_says_where(self, images: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            list(as_images(images, 16))

    def test_a_picture_that_was_closed(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        picture = Image.open(tmp_path / "x.png")
        picture.close()
        with pytest.raises(DataError, match="image 0: the picture cannot be read"):
            list(as_images([picture], 16))

    @settings(deadline=None)
    @given(
        st.one_of(
            hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
            st.lists(
                st.one_of(st.integers(), st.none(), st.text(max_size=5), st.floats(), st.lists(st.integers(), max_size=2)),
                max_size=3,
            ),
        )
    )
    def test_anything_is_images_or_an_error_of_this_package(self, images: Any) -> None:
        try:
            batches = list(as_images(images, 8))
        except EdgeDfcilError:
            return
        assert all(batch.shape[1] == 3 for batch in batches)
