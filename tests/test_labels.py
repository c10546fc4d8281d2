"""Class names: one class has one name, and what is not a name is refused before anything is learnt."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from edge_dfcil import ClassError, DataError
from edge_dfcil.model.labels import check_names, clean_name, folded, match_known, name_targets, outputs_of, same_name

CAFE, CAFE_APART = "Caf\u00e9", "Cafe\u0301"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"


class TestOneName:
    @pytest.mark.parametrize(
        "name", ["cat", "a black cat", CAFE, "\u043a\u043e\u0448\u043a\u0430 \U0001f431", FAMILY, PERSIAN, "7"]
    )
    def test_names_of_any_script_are_kept(self, name: Any) -> None:
        assert clean_name(name) == name

    def test_the_composed_form_is_kept(self) -> None:
        assert clean_name(CAFE_APART) == CAFE
        assert clean_name(np.str_("cat")) == "cat"
        assert type(clean_name(np.str_("cat"))) is str

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "not empty"),
            ("   ", "not empty"),
            (None, "None"),
            (7, "7; it must be a string"),
            (b"cat", "must be a string"),
            ("cat ", "make it 'cat'"),
            ("\u3000cat", "make it 'cat'"),
            ("cat\n", "make it 'cat'"),
            ("c\x1b[31mat", r"'c\\x1b\[31mat', with a control character at position 1"),
            ("a\tb", "control character"),
            ("a\u2028b", "control character"),
            ("caf\udce9", r"caf\\udce9.*half a surrogate"),
            ("cat\u200b", r"cat\\u200b.*cannot be seen"),
            ("\ufeffcat", r"\\ufeffcat.*cannot be seen"),
            ("c\u200dat", "no width"),
            ("\u202etac", "cannot be seen"),
            ("\u3164", r"\\u3164.*cannot be seen"),
        ],
    )
    def test_what_cannot_be_a_name_is_refused_and_shown(self, name: Any, message: str) -> None:
        with pytest.raises(ClassError, match=message) as error:
            clean_name(name)
        str(error.value).encode()
        assert str(error.value).isprintable()

    @settings(deadline=None, max_examples=50)
    @given(st.text(max_size=8))
    def test_a_name_that_passes_can_be_stored_and_stays(self, name: str) -> None:
        try:
            cleaned = clean_name(name)
        except ClassError:
            return
        assert cleaned.encode().decode() == clean_name(cleaned) == unicodedata.normalize("NFC", name)
        assert same_name(cleaned, name)


class TestSlips:
    @pytest.mark.parametrize(
        ("a", "b"),
        [
            ("Cat", "cat"),
            ("ice  cream", "Ice cream"),
            ("ice\u00a0cream", "ice cream"),
            ("\u2764\ufe0f", "\u2764"),
            (CAFE, CAFE_APART),
        ],
    )
    def test_names_that_look_alike_have_one_key(self, a: Any, b: Any) -> None:
        assert folded(a) == folded(b)
        assert folded(folded(a)) == folded(a)

    @pytest.mark.parametrize(("a", "b"), [("a", "A"), ("cat", "cats"), ("Ma\u00dfe", "Masse"), ("icecream", "ice cream")])
    def test_names_that_differ_have_their_own(self, a: str, b: str) -> None:
        assert folded(a) != folded(b)

    def test_letters_of_both_cases_are_classes(self) -> None:
        assert check_names([*"abcABC"]) == tuple("abcABC")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["Cat", "dog", "cat"], "'Cat' and 'cat' differ only in case"),
            ([CAFE, CAFE_APART], "appears twice"),
            (["\u2764", "\u2764\ufe0f"], r"\\ufe0f"),
            ("cat", r"one string; pass a list of names, \['cat'\]"),
            ({"cat", "dog"}, "order is arbitrary"),
            (frozenset("ab"), "order is arbitrary"),
            (3, "a int; pass a list"),
            (None, "NoneType"),
        ],
    )
    def test_lists_that_cannot_be(self, names: Any, message: str) -> None:
        with pytest.raises(ClassError, match=message):
            check_names(names)

    def test_a_known_name_is_taken_in_its_spelling_and_a_slip_is_refused(self) -> None:
        assert match_known({0: CAFE, 1: "tea"}, [CAFE_APART, "milk"]) == {0: CAFE_APART, 1: "tea"}
        with pytest.raises(ClassError, match=r"'Milk' differs from the known class 'milk'"):
            match_known({0: "Milk"}, ["milk"])
        assert match_known({0: "Milk", 1: "milk"}, ["milk", "Milk"]) == {0: "Milk", 1: "milk"}, "an old model may know both"

    def test_outputs_are_found_by_either_form(self) -> None:
        assert outputs_of({7: CAFE_APART, 8: "tea"}, ["tea", CAFE]) == {7: 1, 8: 0}
        assert outputs_of({7: CAFE_APART}, [CAFE, CAFE_APART]) == {7: 1}, "an exact match comes first"
        with pytest.raises(ClassError, match=r"does not know 'Tea' \(is 'tea' meant\?\); it knows 'tea'"):
            outputs_of({0: "Tea"}, ["tea"])
        with pytest.raises(ClassError, match="does not know 7"):
            outputs_of({0: 7}, ["tea"])  # type: ignore[dict-item]
        with pytest.raises(ClassError, match="and 80 more"):
            outputs_of({0: "x"}, [str(i) for i in range(100)])


class Named(Dataset[Any]):
    def __init__(self, classes: Any = ("ant", "bee")) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        return torch.zeros(3, 8, 8), index % 2


class TestTargets:
    @pytest.mark.parametrize(
        "classes",
        [
            ["ant", "bee"],
            ("ant", "bee"),
            np.array(["ant", "bee"]),
            {0: "ant", 1: "bee"},
            {np.int64(0): "ant", np.uint8(1): "bee"},
            {torch.tensor(0): "ant", torch.tensor(1): "bee"},
            {False: "ant", True: "bee"},
            {"x": 0, "y": 1, "0": 2, 0: "ant", 1: "bee"},
        ],
    )
    def test_classes_of_any_kind(self, classes: Any) -> None:
        if "x" in classes:
            classes = {key: name for key, name in classes.items() if isinstance(name, str)}
        assert name_targets({1, 0}, None, classes) == {0: "ant", 1: "bee"}

    @pytest.mark.parametrize(
        ("classes", "error", "message"),
        [
            ({"ant", "bee"}, ClassError, "order is arbitrary"),
            ("ant", ClassError, "one string"),
            (b"ant", ClassError, "one string"),
            (2, ClassError, "a int; pass a list"),
            (torch.tensor([1]), ClassError, "Tensor; pass a list"),
            ((name for name in ("ant", "bee")), ClassError, "generator; pass a list"),
            ({"ant": 0, "bee": 1}, DataError, "invert it"),
            (["ant"], DataError, "target 1 has no name; classes names the targets 0"),
            (["ant", None], ClassError, "target 1 is None"),
            (["ant", "Ant"], ClassError, "differ only in case"),
            (["ant", "bee "], ClassError, "target 1 is 'bee '"),
        ],
    )
    def test_classes_that_cannot_be(self, classes: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            name_targets({0, 1}, None, classes)

    def test_names_of_the_data_set_through_its_like(self) -> None:
        both: Dataset[Any] = ConcatDataset([Named(), Named()])
        data: Dataset[Any]
        for data in (Named(), Subset(Subset(Named(), [0, 1]), [0]), both):
            assert name_targets({1}, DataLoader(data), None) == {1: "bee"}
        label = type("ClassLabel", (), {"names": ["ant", "bee"]})()
        hugging_face = type("Data", (), {"features": {"image": None, "label": label}})()
        assert name_targets({1}, type("Loader", (), {"dataset": hugging_face})(), None) == {1: "bee"}
        other: Dataset[Any] = ConcatDataset([Named(), Named(("bee", "ant"))])
        for data in (other, TensorDataset(torch.zeros(2))):
            with pytest.raises(ClassError, match="pass classes="):
                name_targets({1}, DataLoader(data), None)

    def test_targets_that_are_names(self) -> None:
        assert name_targets({"bee", "ant"}, None, None) == {"ant": "ant", "bee": "bee"}
        assert name_targets({"bee"}, None, ["ant", "bee"]) == {"bee": "bee"}
        with pytest.raises(DataError, match="target 'cow' has no name"):
            name_targets({"cow"}, None, ["ant", "bee"])
