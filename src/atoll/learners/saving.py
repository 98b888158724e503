"""Saving: a model as a file that its own framework opens, chosen by the file's ending."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from atoll.core.model_file import ModelFile
from atoll.errors import ConfigurationError, require
from atoll.learners.base import Learner


def write_model(path: Path, kept: ModelFile, learner: Learner | None = None) -> Path:
    """Write a model as .safetensors, .npz, .pt or .onnx; names are the framework's own.

    Of these only .safetensors keeps what the model is about. `.onnx` needs the learner.
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
    writer(path, kept, learner)
    return path


def _safetensors(path: Path, kept: ModelFile, learner: Learner | None) -> None:
    kept.save(path)


def _npz(path: Path, kept: ModelFile, learner: Learner | None) -> None:
    with path.open("wb") as file:
        np.savez(file, **kept.arrays)  # type: ignore[arg-type]


def _torch(path: Path, kept: ModelFile, learner: Learner | None) -> None:
    torch = require("torch", "atoll[torch]", "Saving a .pt file")
    torch.save({name: torch.tensor(array) for name, array in kept.arrays.items()}, path)


def _onnx(path: Path, kept: ModelFile, learner: Learner | None) -> None:
    if learner is None:
        raise ConfigurationError(
            "an .onnx file holds the model's program too, so it needs the federation's file: "
            "atoll export RUN --federation FILE.py, or run.save of a run that was just made"
        )
    export = getattr(learner, "export_onnx", None)
    if export is None:
        raise ConfigurationError(f"{type(learner).__name__} cannot be written as .onnx")
    sides = kept.about.get("input_shape")
    if not isinstance(sides, list) or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConfigurationError(
            "an .onnx file is made from inputs of one array whose shape is known, and this model "
            "has none: several inputs by name, or a file that does not say"
        )
    export(kept.vectors, path, tuple(sides))


WRITERS: dict[str, Callable[[Path, ModelFile, Learner | None], None]] = {
    ".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch, ".onnx": _onnx,
}  # fmt: skip
