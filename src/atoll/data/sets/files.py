"""Where the files of the named sets lie, and how they are read.

A set lies either inside an installed package or in the folder that the environment variable
`ATOLL_DATA` names, which holds one folder per set. Nothing is ever downloaded.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError, MissingPackage, require

#: The environment variable that names the folder of data folders.
VARIABLE = "ATOLL_DATA"


def has_package(module: str) -> bool:
    """Whether a top-level package is installed; it is not imported, as that can take seconds."""
    return find_spec(module) is not None


def has_folder(folder: str) -> bool:
    """Whether the folder of ATOLL_DATA holds this folder."""
    root = os.environ.get(VARIABLE, "")
    return bool(root) and (Path(root).expanduser() / folder).is_dir()


def folder_file(name: str, path: str) -> Path:
    """The file `path` (folder/file) of the set `name`, below the folder of ATOLL_DATA."""
    root = os.environ.get(VARIABLE, "")
    file = Path(root).expanduser() / path
    if not root or not file.is_file():
        raise missing_folder(name, path.partition("/")[0], path)
    return file


def missing_folder(name: str, folder: str, path: str = "") -> DataError:
    """The error for a set whose folder, or a file `path` in it, is not there."""
    root = os.environ.get(VARIABLE, "")
    if not root:
        return DataError(
            f"the set {name!r} is read from the folder {folder!r}; "
            f"set the variable {VARIABLE} to the folder that holds {folder!r}"
        )
    return DataError(
        f"the set {name!r} is read from {(path or folder)!r}, which is not in {root}, "
        f"the folder that the variable {VARIABLE} names"
    )


def package_path(name: str, module: str, path: str, install: str, folder: str = "") -> Path:
    """The file or folder `path` that the package `module` ships; the package is not imported.

    `folder` is where the same data may lie instead, for the sentence about a missing package.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(name, module, install, folder)
    for location in spec.submodule_search_locations:
        found = Path(location) / path
        if found.exists():
            return found
    raise DataError(
        f"the set {name!r} is read from {path!r} of the package {module!r}, "
        f"but the installed version does not hold it; run: pip install --upgrade '{install}'"
    )


def missing_package(name: str, module: str, install: str, folder: str = "") -> MissingPackage:
    """The error for a set whose package is not installed."""
    try:
        require(module, install, f"the set {name!r}")
    except MissingPackage as error:
        other = f"; or set the variable {VARIABLE} to the folder that holds {folder!r}"
        return MissingPackage(f"{error}{other if folder else ''}")
    return MissingPackage(f"the set {name!r} needs the files of the package {module!r}")


def read_text(file: Path) -> str:
    """A whole text file, unpacked if its name ends in .gz."""
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8", newline="") as stream:
            return stream.read()
    return file.read_text(encoding="utf-8")


def lines_of(file: Path) -> io.StringIO:
    """The lines of a text file; unlike splitlines, only at line ends, which are kept."""
    return io.StringIO(read_text(file), newline="")


def read_numbers(file: Path, delimiter: str | None = None) -> NDArray[np.float64]:
    """A table of nothing but numbers, separated by spaces if not by `delimiter`."""
    return np.loadtxt(lines_of(file), delimiter=delimiter, ndmin=2)


def read_columns(file: Path, header: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """A comma-separated table as named columns of text without leading spaces.

    `header` names the columns of a file whose first line is already data.
    """
    lines = [row for row in csv.reader(lines_of(file), skipinitialspace=True) if row]
    names = list(header) or [name.strip() for name in lines.pop(0)]
    short = next((number for number, row in enumerate(lines) if len(row) != len(names)), None)
    if short is not None:
        raise DataError(
            f"{file.name}: data row {short + 1} has {len(lines[short])} fields, not {len(names)}"
        )
    return {
        name: list(column) for name, column in zip(names, zip(*lines, strict=True), strict=True)
    }


def read_arrays(file: Path, *names: str) -> Mapping[str, NDArray[Any]]:
    """These arrays of an npz file; arrays of Python objects are refused."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}


def read_idx(file: Path) -> NDArray[np.uint8]:
    """A packed idx file of bytes, the format that MNIST came in."""
    with gzip.open(file, "rb") as stream:
        raw = stream.read()
    # The header: two zero bytes, 8 for unsigned bytes, the number of dimensions, then each size.
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{file.name} is not an idx file of unsigned bytes")
    dimensions = raw[3]
    sizes = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
