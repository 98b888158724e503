"""Saving: a model as a file that its own framework opens, chosen by the file's ending."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atoll.core.model_file import ModelFile, save_model
from atoll.errors import ConfigurationError, require
from atoll.learners.base import Learner

Shape = tuple[int, ...]


def write_model(
    path: Path, kept: ModelFile, learner: Learner | None = None, shape: Shape | None = None
) -> Path:
    """Write a model as .safetensors, .npz, .pt or .onnx; names are the framework's own.

    Of these only .safetensors keeps what the model is about. `.onnx` needs the learner, and the
    shape of one input.
    """
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        known = ", ".join(WRITERS)
        raise ConfigurationError(
            f"a model is saved as {known}, not {path.suffix!r}; for another format of its "
            "framework's own, run.load_into(...) its object and save that"
        )
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent} to write {path.name} into")
    writer(path, kept, learner, shape)
    return path


def _safetensors(path: Path, kept: ModelFile, learner: Learner | None, shape: Any) -> None:
    save_model(path, kept.vectors, kept.layout, kept.about)


def _npz(path: Path, kept: ModelFile, learner: Learner | None, shape: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, **kept.arrays)  # type: ignore[arg-type]


def _torch(path: Path, kept: ModelFile, learner: Learner | None, shape: Any) -> None:
    torch = require("torch", "atoll[torch]", "Saving a .pt file")
    torch.save({name: torch.tensor(array) for name, array in kept.arrays.items()}, path)


def _onnx(path: Path, kept: ModelFile, learner: Learner | None, shape: Shape | None) -> None:
    export = getattr(learner, "export_onnx", None)
    if learner is not None and shape is None:
        raise ConfigurationError(
            "an .onnx file is made from inputs of one array whose shape is known, and this model "
            "has none: several inputs by name, or a file that does not say"
        )
    if learner is None or shape is None:
        raise ConfigurationError(
            "an .onnx file holds the model's program too, so it needs the federation's file: "
            "atoll export RUN --federation FILE.py, or run.save of a run that was just made"
        )
    if export is None:
        raise ConfigurationError(f"{type(learner).__name__} cannot be written as .onnx")
    export(kept.vectors, path, shape)


WRITERS: dict[str, Callable[[Path, ModelFile, Learner | None, Any], None]] = {
    ".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch, ".onnx": _onnx,
}  # fmt: skip
