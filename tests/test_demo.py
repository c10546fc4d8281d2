"""The digits in the package are those of scikit-learn, and need no optional dependency."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from edge_dfcil.demo import DIGITS, TO_LEARN, Batches


def test_the_digits_are_those_of_scikit_learn_in_the_order_of_a_stratified_split() -> None:
    theirs = load_digits()
    order = np.concatenate(train_test_split(range(len(theirs.target)), test_size=0.25, stratify=theirs.target, random_state=0))
    with np.load(DIGITS) as ours:
        assert np.array_equal(ours["images"], theirs.images[order])
        assert np.array_equal(ours["targets"], theirs.target[order])


def test_digits_are_split_into_images_to_learn_from_and_to_measure_with(train: Batches, test: Batches) -> None:
    assert train.images.shape == (TO_LEARN, 3, 16, 16)
    assert test.images.shape == (450, 3, 16, 16)
    assert set(train.targets.tolist()) == set(test.targets.tolist()) == set(range(10))


@pytest.mark.slow  # a separate Python process imports torch
def test_digits_need_no_library_of_an_extra() -> None:
    code = "import sys; sys.modules.update(sklearn=None, matplotlib=None); from edge_dfcil.demo import digits; digits()"
    subprocess.run([sys.executable, "-c", code], check=True)
