"""Short runs of `tests.canary`, and tests of what it relies on."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from edge_dfcil import SettingError
from edge_dfcil.cli import main
from edge_dfcil.privacy import traces
from tests import canary
from tests.conftest import quick_learner

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the memory of another process is read through /proc")


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "precision"),
    [("quick", "float32"), ("edge", "float32"), ("quick", "bfloat16"), ("frozen", "float32"), ("strict", "float32")],
)
def test_nothing_is_kept(recipe: Any, precision: Any) -> None:
    account = canary.run(recipe, precision=precision)
    looked_for = {"image", "image as floats", "normalised image", "input of the network", "feature", "feature map"}
    assert looked_for <= account.needles.keys()
    if recipe != "frozen":
        assert account.needles["generated image"] and account.needles["weight of the generator"]


@on_linux
@pytest.mark.slow
def test_what_is_kept_on_purpose_is_found() -> None:
    account = canary.run("quick", keep=canary.KEPT, check=False)
    assert {"image", "feature", "generated image", "weight of the generator"} <= account.found.keys()
    assert set(account.files) == {"image"}
    with pytest.raises(AssertionError, match="found in the memory of a process that has learnt"):
        canary.run("quick", keep=["batch"])


def test_needles_are_found_wherever_they_begin() -> None:
    needles = canary.Needles()
    image = canary.canaries(3, 0)[0][:1]
    needles.add_rows("image", image)
    assert len(needles.spans) == image[0].numel() // canary.SPAN
    needles.add("nothing", bytes(canary.SPAN))  # zeros are everywhere
    assert set(needles.spans.values()) == {"image"}
    whole = image.numpy().tobytes()
    for shift in range(8):
        assert needles.within(b"x" * shift + whole + b"x" * 9) == needles.spans.keys()
    assert needles.within(bytes(len(whole))) == set()
    assert needles.counted(needles.within(whole[: 2 * canary.SPAN])) == {"image": 2}


@on_linux
def test_freed_memory_is_overwritten() -> None:
    """For sizes that glibc keeps in its caches, in bins, and as the ends of larger free blocks."""
    libc = traces._glibc()
    if libc is None:
        pytest.skip("not glibc")
    sizes = [24, 100, 1000, 5000, 30_000, 70_000] * 40
    places = [libc.malloc(size) for size in sizes]
    for place, size in zip(places, sizes, strict=True):
        ctypes.memset(place, 0xA5, size)
    for place in places[::2]:
        libc.free(place)
    traces.overwrite_freed()
    freed = zip(places[::2], sizes[::2], strict=True)
    assert not any(b"\xa5" * 16 in ctypes.string_at(place, min(size, 1000)) for place, size in freed)
    for place, size in zip(places[1::2], sizes[1::2], strict=True):
        assert ctypes.string_at(place, size) == b"\xa5" * size, "memory in use is unchanged"
        libc.free(place)


def test_a_session_that_has_ended_holds_no_image() -> None:
    learner = quick_learner()
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    loader = [(images, torch.arange(8) % 2)]
    count = sys.getrefcount(loader)
    session = learner.session(loader, ["a", "b"], progress=False)
    report = session.run()
    assert sys.getrefcount(loader) == count
    assert session.run() is report


def test_the_command_line_switches_core_dumps_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = list[str]()

    @contextlib.contextmanager
    def recorded() -> Iterator[None]:
        seen.append("off")
        yield

    monkeypatch.setattr(traces, "no_core_dumps", recorded)
    for options in ([], ["--no-core-dumps"]):
        command = ["learn", str(tmp_path / "missing"), "--model", str(tmp_path / "m.safetensors"), *options]
        assert CliRunner().invoke(main, command).exit_code
        assert len(seen) == len(options)


@on_linux
def test_core_dumps_are_switched_off_and_on_again() -> None:
    prctl = ctypes.CDLL(None).prctl
    before = prctl(traces.PR_GET_DUMPABLE, 0, 0, 0, 0)
    with traces.no_core_dumps():
        assert prctl(traces.PR_GET_DUMPABLE, 0, 0, 0, 0) == 0
    assert prctl(traces.PR_GET_DUMPABLE, 0, 0, 0, 0) == before


def test_where_core_dumps_cannot_be_switched_off_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SettingError, match="on Linux only"), traces.no_core_dumps():
        pass
