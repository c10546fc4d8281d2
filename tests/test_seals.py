"""Exported files and model files: damage is detected before any prediction, and signatures identify their author."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_dfcil import ExportError, Learner, SettingError, SignatureError
from edge_dfcil.cli import main
from exporters import OnnxClassifier
from exporters.signatures import check_signature, sign

GOLDEN = Path(__file__).parent / "golden"
DIGEST = b"rJ\n\x06sha256\x12@" + bytes(64)  # the last field of a file, with another digest


@pytest.fixture(scope="module")
def exported(_learnt: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    _learnt.export(path)
    return path


@pytest.fixture(scope="module")
def content(exported: Path) -> bytes:
    return exported.read_bytes()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key, made with the commands of the documentation."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "private.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def refuses(path: Path, damaged: bytes) -> None:
    path.write_bytes(damaged)
    with pytest.raises(ExportError):
        OnnxClassifier(path)


class TestDamage:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(part=st.integers(0, 2), share=st.floats(0, 1), flipped=st.integers(1, 255))
    def test_any_flipped_byte_is_noticed(self, content: bytes, tmp_path: Path, part: int, share: float, flipped: int) -> None:
        # A third of the examples each: anywhere, in the names and settings at the end, and in the digest itself.
        length = (len(content), 2000, 80)[part]
        at = len(content) - 1 - int(share * (length - 1))
        refuses(tmp_path / "m.onnx", content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])

    def test_every_bit_of_the_digest_counts(self, content: bytes, tmp_path: Path) -> None:
        # Some flips make a name invalid UTF-8, which ONNX Runtime opens; others give another valid name.
        for at in range(len(content) - len(DIGEST), len(content)):
            for bit in range(8):
                refuses(tmp_path / "m.onnx", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(near_the_end=st.booleans(), share=st.floats(0, 1), more=st.binary(min_size=1, max_size=100))
    def test_any_cut_and_any_addition_is_noticed(
        self, content: bytes, tmp_path: Path, near_the_end: bool, share: float, more: bytes
    ) -> None:
        length = 200 if near_the_end else len(content)
        refuses(tmp_path / "m.onnx", content[: len(content) - 1 - int(share * (length - 1))])
        refuses(tmp_path / "m.onnx", content + more)

    def test_parts_that_change_places_are_noticed(self, content: bytes, tmp_path: Path) -> None:
        half = len(content) // 2
        refuses(tmp_path / "m.onnx", content[half:] + content[:half])

    def test_a_file_that_another_tool_made_newer_names_both_versions(self, exported: Path, tmp_path: Path) -> None:
        model = onnx.load(exported)
        model.ir_version = 99
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ExportError, match=r"not as it was exported.*IR version is 99, where edge-dfcil writes 10 at most"):
            OnnxClassifier(tmp_path / "m.onnx")

    def test_a_file_that_was_changed_on_purpose_opens_when_asked(self, exported: Path, tmp_path: Path) -> None:
        model = onnx.load(exported)
        model.doc_string = "mine"
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ExportError, match=r"not as it was exported.*verify=False"):
            OnnxClassifier(tmp_path / "m.onnx")
        images = np.zeros((2, 3, 16, 16), np.uint8)
        changed = OnnxClassifier(tmp_path / "m.onnx", verify=False)
        np.testing.assert_allclose(changed.probabilities(images), OnnxClassifier(exported).probabilities(images), atol=1e-6)
        assert not changed.sealed

    def test_a_digest_that_was_taken_off_is_missed(self, exported: Path, tmp_path: Path) -> None:
        model = onnx.load(exported)
        assert model.metadata_props[-1].key == "sha256"
        del model.metadata_props[-1]
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ExportError, match="not as it was exported"):
            OnnxClassifier(tmp_path / "m.onnx")

    def test_files_of_before_have_none(self) -> None:
        assert not OnnxClassifier(GOLDEN / "schema1" / "cifar.onnx").sealed

    def test_it_is_plain_onnx(self, exported: Path) -> None:
        onnx.checker.check_model(str(exported))


class TestSignatures:
    def test_the_owner_of_the_key_is_known_by_it(self, exported: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
        private, public = keys
        path = tmp_path / "m.onnx"
        path.write_bytes(exported.read_bytes())
        with pytest.raises(SignatureError, match=r"m.onnx.sig cannot be read"):
            OnnxClassifier(path, public_key=public)
        signature = sign(path, private)
        check_signature(path, public)
        assert OnnxClassifier(path, public_key=public).sealed
        verified = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin"]
        command = [*verified, "-inkey", str(public), "-in", str(path), "-sigfile", str(signature)]
        assert "Successfully" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
        path.write_bytes((GOLDEN / "schema1" / "cifar.onnx").read_bytes())  # another file, which is intact
        with pytest.raises(SignatureError, match="not what the owner"):
            OnnxClassifier(path, public_key=public)
        with pytest.raises(SignatureError, match="not what the owner"):
            check_signature(path, public)

    def test_keys_that_are_none(self, exported: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
        private, public = keys
        (tmp_path / "text.pem").write_text("hello")
        subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", tmp_path / "other.pem"], check=True)
        for key, message in (
            (tmp_path / "text.pem", "PEM"),
            (tmp_path / "none.pem", "No such file"),
            (tmp_path / "other.pem", "Ed25519"),
            (public, "PEM"),
        ):
            with pytest.raises(SettingError, match=message):
                sign(exported, key)
        with pytest.raises(SettingError, match="PEM"):
            check_signature(exported, private)

    def test_the_library_that_is_missing_is_named(
        self, exported: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "cryptography", None)
        private, public = keys
        with pytest.raises(SettingError, match=r"pip install 'edge-dfcil\[sign\]'"):
            sign(exported, private)
        with pytest.raises(SettingError, match=r"pip install 'edge-dfcil\[sign\]'"):
            check_signature(exported, public)


class TestCommands:
    def test_verify_takes_model_files_and_exported_ones(self, learnt: Learner, exported: Path, tmp_path: Path) -> None:
        model = learnt.save(tmp_path / "m.safetensors")
        done = CliRunner().invoke(main, ["verify", str(model), str(exported), str(GOLDEN / "schema1" / "cifar.onnx"), "--json"])
        assert [one["kind"] for one in json.loads(done.stdout)][:2] == ["model file", "ONNX file"]
        assert "no SHA-256" in done.stdout

    def test_damage_ends_with_an_error(self, learnt: Learner, tmp_path: Path) -> None:
        model = learnt.save(tmp_path / "m.safetensors")
        content = model.read_bytes()
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = CliRunner().invoke(main, ["verify", str(model)])
        assert done.exit_code == 1 and "damaged" in done.stderr

    def test_sign_and_verify(self, learnt: Learner, keys: tuple[Path, Path], tmp_path: Path) -> None:
        private, public = map(str, keys)
        model = str(learnt.save(tmp_path / "m.safetensors"))
        assert CliRunner().invoke(main, ["sign", model, "--key", private]).exit_code == 0
        done = CliRunner().invoke(main, ["verify", model, "--key", public])
        assert done.exit_code == 0 and "signed by the owner" in done.stdout
        Path(model).write_bytes(Path(model).read_bytes() + b"0")
        done = CliRunner().invoke(main, ["verify", model, "--key", public])
        assert done.exit_code == 1 and "not what the owner" in done.stderr
