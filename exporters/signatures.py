"""Who wrote a file: Ed25519 signatures (RFC 8032) of model files and exported files, each in a separate file next to it.

A signature is 64 bytes over the whole file, as `openssl pkeyutl -sign -rawin` makes it. Keys are PEM files:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem

Needs the library cryptography: pip install 'edge-dfcil[sign]' or 'edge-dfcil-runtime[sign]'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporters.errors import SettingError, SignatureError
from exporters.files import replace_file

ENDING = ".sig"


def sign(path: str | Path, private_key: str | Path, *, password: bytes | None = None) -> Path:
    """Signs a file; returns the path of the signature, which is the file's own with `.sig` appended.

    `private_key` is a PEM file, `password` the password if it is encrypted. Raises `SettingError` for a key that cannot be
    read or is not Ed25519, `SignatureError` for a file that cannot be read or a signature that cannot be written.
    """
    key = _key(private_key, lambda pem: _serialization().load_pem_private_key(pem, password), "Ed25519PrivateKey")
    signature: bytes = key.sign(_content(path))
    target = Path(f"{path}{ENDING}")
    try:
        replace_file(target, signature)
    except OSError as error:
        raise SignatureError(f"{target} could not be written: {error.strerror or error}") from error
    return target


def check_signature(path: str | Path, public_key: str | Path, *, content: bytes | None = None) -> None:
    """Raises `SignatureError` unless PATH.sig is a signature of the file by the owner of `public_key`, a PEM file.

    `content` is that of the file, if it has already been read. Raises `SettingError` for a key that cannot be read or is
    not Ed25519.
    """
    key = _key(public_key, lambda pem: _serialization().load_pem_public_key(pem), "Ed25519PublicKey")
    from cryptography.exceptions import InvalidSignature

    signature = _content(f"{path}{ENDING}")
    try:
        key.verify(signature, _content(path) if content is None else content)
    except InvalidSignature:
        raise SignatureError(
            f"{path} is not what the owner of {public_key} has signed: the file, its signature {path}{ENDING} or the key does "
            "not match. Do not use the file; get it and its signature again"
        ) from None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise SettingError("signatures need the library cryptography: pip install 'edge-dfcil[sign]'") from error
    return serialization


def _key(path: str | Path, load: Callable[[bytes], Any], kind: str) -> Any:
    _serialization()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = load(Path(path).read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"{path} cannot be read as a key in PEM form ({reason})") from error
    if not type(key).__name__.endswith(kind):
        raise SettingError(f"{path} is not an {kind}; `openssl genpkey -algorithm ed25519 -out private.pem` makes a private key")
    return key


def _content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror or error}") from error
