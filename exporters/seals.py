"""The SHA-256 at the end of an exported ONNX file, by which damage and changes after the export are detected.

The file's last field is an entry of its metadata: "sha256", and the digest of every byte before that field. It is checked without
parsing the file as ONNX. It does not prove who wrote the file: see `exporters.signatures` for that.
"""

from __future__ import annotations

import hashlib

IR_VERSION = 10  # of ONNX, at most, in what is exported: runtimes from 1.20 on read it
# Field 14 of a ModelProto, metadata_props, 74 bytes long: key (field 1) "sha256", value (field 2) of 64 characters.
_FIELD = b"\x72\x4a\x0a\x06sha256\x12\x40"
_LENGTH = len(_FIELD) + 64


def seal(content: bytes) -> bytes:
    """A serialized ONNX model with its digest at the end."""
    return content + _FIELD + hashlib.sha256(content).hexdigest().encode()


def is_sealed(content: bytes) -> bool:
    """Whether there is a digest at the end of a file."""
    return content[-_LENGTH:].startswith(_FIELD)


def is_intact(content: bytes) -> bool:
    """Whether the digest at the end of a file is that of the rest."""
    return is_sealed(content) and seal(content[:-_LENGTH]) == content


def ir_version(content: bytes) -> int | None:
    """The ONNX IR version that a file begins with, as exported files do (field 1 of a ModelProto); None where it does not."""
    version, shift = 0, 0
    for byte in content[1:6] if content[:1] == b"\x08" else b"":
        version |= (byte & 0x7F) << shift
        if byte < 0x80:
            return version
        shift += 7
    return None
