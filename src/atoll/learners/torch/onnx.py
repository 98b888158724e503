"""ONNX: a torch model with its program, for runtimes that know neither torch nor atoll."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from atoll.errors import ConfigurationError, require
from atoll.learners.torch.weights import named


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without what a logger would say of packages that nobody needs."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def export_onnx(
    module: nn.Module, arrays: Mapping[str, NDArray[Any]], path: Path, shape: tuple[int, ...]
) -> None:
    """Write a module with these arrays, from `input` [N, *shape] to `output`, for any N.

    It is written in evaluation mode.

    Raises ConfigurationError for what ONNX has no operators for.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "atoll[onnx]", "Writing an .onnx file")
    own = deepcopy(module).cpu().eval()
    tensors = named(own)
    with torch.no_grad():
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array))
    # Two rows: of one row the exporter would believe that there is never another number.
    example = torch.zeros(2, *shape)
    many: Any = {0: torch.export.Dim("n", min=1)}
    try:
        with warnings.catch_warnings(), quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                own, (example,), str(path), input_names=["input"], output_names=["output"],
                dynamic_shapes=(many,), dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigurationError(f"this module cannot be written as .onnx: {first}") from error
