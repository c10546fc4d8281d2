"""From a learner to a folder or a repository of the Hugging Face Hub: the model file, its card, and on request an ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from edge_dfcil.card import model_card
from edge_dfcil.errors import ModelFileError, SettingError
from edge_dfcil.hub import MODEL_FILE, FromHub, check_token, client, errors_of
from edge_dfcil.model.model import Model
from edge_dfcil.results import Evaluation
from exporters import ExportReport
from exporters.files import replace_file

ONNX_FILE = "model.onnx"
CARD_FILE = "README.md"


class Publishing(FromHub):
    """The part of `Learner` that publishes its current model. All files are of one model, even if another thread commits."""

    _model: Model
    with_model: Any

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        onnx: Literal["fixed", "any"] | None = None,
        evaluation: Evaluation | None = None,
        description: str | None = None,
        license: str | None = None,
    ) -> Path:
        """Writes `model.safetensors` and a model card, `README.md`, for `from_pretrained` and for people. Returns the folder.

        Raises `NotLearnedError` before the first task, `SettingError` for an evaluation of other classes or without
        `huggingface_hub` (`pip install 'edge-dfcil[hub]'`), `ModelFileError` when a file cannot be written, and `ExportError`.

        Parameters
        ----------
        folder
            It is created if it does not exist. Files of these names are replaced; a `model.onnx` of an earlier call is removed.
        onnx
            "fixed" or "any" adds `model.onnx`, as `export(input=...)` writes it.
        evaluation
            What `evaluate` measured of this model, for the card.
        description, license
            Your Markdown at the top of the card, and the license of the model as the Hub names it ("apache-2.0").
        """
        learner, folder = self._publishable(evaluation), Path(folder)
        exported = _write_model(learner, folder, onnx)
        about: Any = {"evaluation": evaluation, "description": description, "license": license}
        _write(folder / CARD_FILE, model_card(learner.model, folder.resolve().name, exported=exported, **about))
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        revision: str | None = None,
        message: str | None = None,
        onnx: Literal["fixed", "any"] | None = None,
        evaluation: Evaluation | None = None,
        description: str | None = None,
        license: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository, in one commit, and returns the URL of that commit.

        The other parameters and errors are those of `save_pretrained`. Raises `HubError` when the Hub does not take the model.

        Parameters
        ----------
        repo_id
            "owner/name". It is created if it does not exist.
        private
            Whether a new repository is private; an existing one is not changed.
        token
            A token with write permission. None takes HF_TOKEN, or the token of `hf auth login`.
        revision
            An existing branch; None takes the main one.
        message
            The commit message; None says how many classes the model knows.
        """
        learner, hub = self._publishable(evaluation), client(token)
        check_token(hub)
        about: Any = {"evaluation": evaluation, "description": description, "license": license}
        failed = f"{repo_id} was not pushed to the Hugging Face Hub"
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            exported = _write_model(learner, folder, onnx)
            with errors_of(failed):
                repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            _write(folder / CARD_FILE, model_card(learner.model, repository, exported=exported, **about))
            text = message or f"Push a model of {len(learner.classes)} classes"
            # An ONNX file of an earlier push would disagree with this model.
            where: Any = {"repo_id": repository, "revision": revision, "delete_patterns": [ONNX_FILE]}
            with errors_of(failed):
                return hub.upload_folder(folder_path=folder, commit_message=text, **where).commit_url

    def _publishable(self, evaluation: Evaluation | None) -> Any:
        """A learner with the current model, which later commits do not change."""
        learner = self.with_model(self._model)
        learner.check_answering()
        if evaluation is not None and set(evaluation.classes) != set(learner.classes):
            raise SettingError(
                f"evaluation is of the classes {', '.join(evaluation.classes[:5])}, ... and not of those of the model; pass what "
                "evaluate(loader) of this learner returned"
            )
        return learner


def _write_model(learner: Any, folder: Path, onnx: Literal["fixed", "any"] | None) -> ExportReport | None:
    client()  # raises an error that says what to install, before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be created: {error.strerror or error}") from error
    learner.save(folder / MODEL_FILE)
    if onnx is None:
        (folder / ONNX_FILE).unlink(missing_ok=True)
        return None
    report: ExportReport = learner.export(folder / ONNX_FILE, input=onnx)
    return report


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be written: {error.strerror or error}") from error
