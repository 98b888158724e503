"""The model file: a model's arrays by their own names, and what they are of.

It is a safetensors file, which any framework's reader opens without atoll: its names are those of
the framework (`layer1.weight`), and "atoll" in its metadata is JSON of what the model is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from atoll.core import files
from atoll.core.vectors import SECTIONS, Entry, Layout, Section, Vectors
from atoll.errors import CheckpointError

KIND = "model"


@dataclass(frozen=True)
class ModelFile:
    """A model as a file has it.

    Args:
        arrays: by name, in the layout's order.
        layout: names, shapes and sections; None of arrays that are no learner's.
        about: which run, plan and round it is of, its metrics, how its inputs were encoded.
    """

    arrays: dict[str, NDArray[Any]]
    layout: Layout | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: Vectors, layout: Layout | None, about: Mapping[str, Any]) -> ModelFile:
        """A model's; sections that are not the layout's go by their own names.

        Where clients have models of their own there may be none that is everybody's.
        """
        if layout is None or set(model) != set(layout.sizes):
            return ModelFile(dict(model), None, about)
        return ModelFile(layout.unpack(model), layout, about)

    @property
    def vectors(self) -> Vectors:
        """The model as learners take it."""
        return dict(self.arrays) if self.layout is None else self.layout.pack(self.arrays)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        entries = () if self.layout is None else self.layout.entries
        named = [[entry.name, entry.section, entry.dtype] for entry in entries]
        files.save(path, KIND, {**self.about, "arrays": named}, self.arrays)


def save_model(path: Path, model: Vectors, layout: Layout | None, about: Mapping[str, Any]) -> None:
    """Write a model with what it is about (see `ModelFile.of`)."""
    ModelFile.of(model, layout, about).save(path)


def load_model(path: str | Path) -> ModelFile:
    """Read what `save_model` wrote; `CheckpointError` says what is wrong with the file."""
    about, arrays = files.load(path, KIND)
    entries = about.pop("arrays", [])
    if not entries:
        return ModelFile(arrays, None, about)
    layout = _layout(path, entries, arrays)
    return ModelFile({entry.name: arrays[entry.name] for entry in layout.entries}, layout, about)


def _layout(path: str | Path, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> Layout:
    ends: dict[Section, int] = dict.fromkeys(SECTIONS, 0)
    found = []
    try:
        for name, section, dtype in entries:
            if section not in get_args(Section) or arrays[name].dtype != SECTIONS[section]:
                raise ValueError
            size = int(np.prod(arrays[name].shape))
            found.append(Entry(str(name), arrays[name].shape, str(dtype), section, ends[section]))
            ends[section] += size
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is damaged: it does not say what its arrays are") from None
    if len(found) != len(arrays):
        raise CheckpointError(f"{path} is damaged: it does not say what all its arrays are")
    return Layout(tuple(found))
