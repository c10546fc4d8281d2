"""The Hugging Face Hub, from which model files are loaded and to which they are pushed: names, the client, and its errors.

`huggingface_hub` is an extra, imported when a name on the Hub is used; its telemetry is off.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from edge_dfcil._version import __version__
from edge_dfcil.errors import HubError, SettingError
from exporters import telemetry

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MODEL_FILE = "model.safetensors"
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


class FromHub:
    """Adds `from_pretrained`, which passes a file from a folder or from the Hub to `load`."""

    load: Any

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> Self:
        """Loads a model file, the `model.safetensors` of a folder, or that of a repository on the Hugging Face Hub.

        Raises `HubError` when the Hub does not give the file, `SettingError` without `huggingface_hub`
        (`pip install 'edge-dfcil[hub]'`), and what `load` raises.

        Parameters
        ----------
        path_or_repo
            A path, or "owner/name" if no such path exists. A download is kept in the cache of `huggingface_hub`, which is used
            when the Hub cannot be reached.
        revision
            A branch, tag or commit of the repository; None takes its main branch.
        token
            None takes HF_TOKEN, or the token of `hf auth login`, if the repository needs one.
        options
            Those of `load`.
        """
        found: Self = cls.load(model_file(path_or_repo, revision=revision, token=token), **options)
        return found


def model_file(path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Where the model file of a path or a repository is; see `FromHub.from_pretrained`."""
    path = Path(path_or_repo)
    if path.is_dir():
        return path / MODEL_FILE
    if path.exists() or path.suffix == ".safetensors" or not isinstance(path_or_repo, str) or not _REPO.fullmatch(path_or_repo):
        return path
    hub = client(token)
    with errors_of(f"{path_or_repo} is not a local path, and was not loaded from the Hugging Face Hub"):
        return Path(hub.hf_hub_download(path_or_repo, MODEL_FILE, revision=revision))


def client(token: str | None = None) -> HfApi:
    """The Hub's client. Raises `SettingError` when `huggingface_hub` is not installed."""
    telemetry.switch_off()
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise SettingError(f"the Hugging Face Hub needs huggingface_hub ({error}): pip install 'edge-dfcil[hub]'") from error
    return HfApi(token=token, library_name="edge-dfcil", library_version=__version__)


def check_token(hub: HfApi) -> None:
    """Raises `HubError` when there is no token, which every write needs."""
    from huggingface_hub import get_token

    if not hub.token and get_token() is None:
        raise HubError(f"there is no token to write to the Hugging Face Hub with; {_LOG_IN}")


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Turns errors of `huggingface_hub` and its HTTP client into a `HubError`: `what` failed, why, and what to do."""
    try:
        yield
    except _failures() as error:
        raise HubError(f"{what}: {_reason(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    # From httpx or its successor, depending on the version of huggingface_hub.
    failed_request: type[Exception] = vars(errors)["HTTPError"]
    return failed_request, errors.HFValidationError, OSError, ValueError


def _reason(error: Exception) -> str:
    """One sentence on why, and what to do. Subclasses come before their base classes."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    known: list[tuple[type[BaseException], str]] = [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so no request is sent; unset it"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached, and the cache has no copy; check the connection, and retry"),
        (errors.GatedRepoError, "its owner grants access on request; ask for it on the repository's page"),
        (errors.RepositoryNotFoundError, f"the Hub shows no such repository; check its name, or, if it is private, {_LOG_IN}"),
        (errors.RevisionNotFoundError, "the repository has no such revision; check revision="),
        (errors.EntryNotFoundError, f"the repository has no {MODEL_FILE}; `push_to_hub` writes one"),
        (errors.HFValidationError, f"{_one_line(error)}; name a repository as owner/name"),
    ]
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    if status in (401, 403):
        return f"the token does not permit this (status {status}); take one with write permission, and {_LOG_IN}"
    if status is not None:
        return f"the Hub answered with status {status} ({_one_line(error)})"
    return f"the Hub cannot be reached ({type(error).__name__}: {_one_line(error)}); check the connection, and retry"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
