"""Hugging Face `datasets`: tables of columns, and pictures decoded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.arrow import Missing, Table, check_columns
from atoll.data.dataset import Dataset
from atoll.data.encoding.kinds import NoValue
from atoll.data.sources.arrays import channels_first, from_arrays
from atoll.data.sources.table import client_keys, from_table, label_values
from atoll.data.tasks import Task, may_be_labels
from atoll.errors import DataError, require

#: Pictures decoded at a time.
_BATCH = 256


def from_huggingface(
    dataset: Any,
    *,
    label: str,
    features: str | Sequence[str] | None = None,
    client: str | Sequence[str] | None = None,
    task: Task | str | None = None,
    classes: int | None = None,
    test: Any = None,
    missing: Missing = "refuse",
    no_value: NoValue = (),
    name: str | None = None,
) -> Dataset:
    """The rows of a `datasets.Dataset`, or the "train" and "test" split of a `DatasetDict`.

    A column of pictures becomes float32 inputs [N, C, H, W], scaled to [0, 1] as torchvision's
    `to_tensor` does; without `features` it is taken alone. Other columns are encoded as
    `from_table` does, those with named classes as categories. A label with named classes gives
    `class_names` in their own order. `test` is another `datasets.Dataset` and goes before the
    "test" split. Nothing is fetched.

    Raises DataError for streams, missing splits and columns, and pictures of several sizes.
    """
    library = require("datasets", "datasets", "from_huggingface")
    train, test = _splits(dataset, test, name or "huggingface", library)
    name = name or getattr(train.info, "dataset_name", None) or "huggingface"
    clients = (client,) if isinstance(client, str) else tuple(client or ())
    features = (features,) if isinstance(features, str) else features
    check_columns((label, *clients, *(features or ())), train.column_names, name)
    pictures = _pictures(train, features, label, name, library)
    named = getattr(train.features[label], "names", None)
    class_names = tuple(named) if named and may_be_labels(task) else ()
    if pictures is None:
        return from_table(
            _table(train, None, label, library),
            label=label,
            features=features,
            client=clients,
            task=task,
            classes=classes,
            test=None if test is None else _table(test, None, label, library),
            missing=missing,
            no_value=no_value,
            name=name,
            class_names=class_names,
        )
    columns = _table(train, (label, *clients), label, library)
    y, sorted_names = label_values(columns, label, name)
    return from_arrays(
        _pixels(train, pictures, name),
        y,
        task=task,
        classes=classes,
        keys=client_keys(columns, clients, name),
        test=None if test is None else _test_pair(test, pictures, label, name, library),
        name=name,
        class_names=class_names or sorted_names,
        describe=f"Pictures {pictures!r} of {name}, label {label!r}",
    )


def _splits(dataset: Any, test: Any, name: str, library: ModuleType) -> tuple[Any, Any]:
    if isinstance(dataset, library.DatasetDict):
        if "train" not in dataset:
            raise DataError(
                f"{name}: there is no split 'train' but {', '.join(map(repr, dataset))}; "
                "give one split as the dataset and another one as test=..."
            )
        test = dataset.get("test") if test is None else test
        dataset = dataset["train"]
    for part in (dataset,) if test is None else (dataset, test):
        if not isinstance(part, library.Dataset):
            raise DataError(
                f"{name}: from_huggingface takes a datasets.Dataset or DatasetDict, "
                f"not {type(part).__name__!r}; a streamed one must be loaded with streaming=False"
            )
    return dataset, test


def _pictures(
    dataset: Any, features: Sequence[str] | None, label: str, name: str, library: ModuleType
) -> str | None:
    """The column of pictures to learn from, None where the inputs are other columns."""
    wanted = dataset.column_names if features is None else list(features)
    pictures = [column for column in wanted if isinstance(dataset.features[column], library.Image)]
    if not pictures:
        return None
    if len(pictures) > 1 or (features is not None and len(wanted) > 1):
        raise DataError(
            f"{name}: a column of pictures must be the only input, not one of "
            f"{', '.join(map(repr, pictures if features is None else wanted))}; "
            "choose it with features=..."
        )
    return pictures[0]


def _table(dataset: Any, columns: Sequence[str] | None, label: str, library: ModuleType) -> Table:
    """Columns as an Arrow table; named classes other than the label become categories."""
    arrow = require("pyarrow", "pyarrow>=18", "from_huggingface")
    if columns is not None:
        dataset = dataset.select_columns(list(columns))
    # Through the format, not `.data`, which knows nothing of select() and shuffle().
    table = dataset.with_format("arrow")[:]
    for position, column in enumerate(table.column_names):
        feature = dataset.features[column]
        if column != label and isinstance(feature, library.ClassLabel):
            names = arrow.array(feature.names)
            chunks = [names.take(codes) for codes in table[column].chunks]
            table = table.set_column(position, column, arrow.chunked_array(chunks, names.type))
    return table


def _test_pair(
    test: Any, pictures: str, label: str, name: str, library: ModuleType
) -> tuple[NDArray[Any], NDArray[Any]]:
    part = f"{name}, test part"
    check_columns((pictures, label), test.column_names, part)
    y, _ = label_values(_table(test, (label,), label, library), label, part)
    return _pixels(test, pictures, part), y


def _pixels(dataset: Any, column: str, name: str) -> NDArray[np.float32]:
    """Decoded pictures [N, C, H, W] in [0, 1], a batch at a time."""
    pixels: NDArray[np.float32] | None = None
    batches = dataset.select_columns([column]).with_format("numpy").iter(batch_size=_BATCH)
    for start, batch in zip(range(0, len(dataset), _BATCH), batches, strict=True):
        block = _block(batch[column], column, name)
        if pixels is None:
            pixels = np.empty((len(dataset), *block.shape[1:]), dtype=np.float32)
        if block.shape[1:] != pixels.shape[1:]:
            raise _several_shapes(column, {block.shape[1:], pixels.shape[1:]}, name)
        pixels[start : start + len(block)] = block
    if pixels is None:
        raise DataError(f"{name}: there are no examples")
    return pixels


def _block(pictures: Any, column: str, name: str) -> NDArray[np.float32]:
    stacked = np.asarray(pictures)
    if stacked.dtype.kind != "O":
        return channels_first(stacked)
    lacking = sum(picture is None for picture in pictures)
    if lacking:
        raise DataError(f"{name}: column {column!r} lacks pictures; drop these rows first")
    raise _several_shapes(column, {np.shape(picture) for picture in pictures}, name)


def _several_shapes(column: str, shapes: set[tuple[int, ...]], name: str) -> DataError:
    shown = " and ".join(map(str, sorted(shapes)[:3]))
    return DataError(
        f"{name}: column {column!r} has pictures of several shapes, such as {shown}; "
        "bring them to one size and mode with map()"
    )
