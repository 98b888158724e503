"""PyTorch: any map-style dataset of (input, label) pairs, and torchvision's sets by name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.data.dataset import Dataset
from atoll.data.sources.arrays import channels_first, from_arrays
from atoll.data.tasks import Task, may_be_labels
from atoll.errors import DataError, require

Array = NDArray[Any]


def from_torch(
    dataset: Any,
    *,
    test: Any = None,
    classes: int | None = None,
    task: Task | str | None = None,
    keys: Mapping[str, ArrayLike] | None = None,
    name: str = "torch",
) -> Dataset:
    """Every (input, label) pair of a map-style dataset, read once.

    Inputs are tensors, arrays, numbers or PIL pictures, all of one shape; a picture becomes
    [C, H, W] in [0, 1], as torchvision's `to_tensor` makes it, everything else is kept as it is.
    A transform is applied once per item here, so augmentation does not vary by round. A
    TensorDataset, a torchvision-like set without transforms and a Subset of either are read
    whole; any other dataset is read in a loop. `classes` of the dataset become `class_names`.
    `test` is another dataset; the rest is as in `from_arrays`.

    Raises DataError for streams, items that are no pairs and shapes that differ.
    """
    x, y = _pair(dataset, name)
    return from_arrays(
        x,
        y,
        task=task,
        classes=classes,
        keys=keys,
        test=None if test is None else _pair(test, f"{name}, test part"),
        name=name,
        class_names=_class_names(dataset, y, task, classes),
    )


def from_torchvision(name: str, root: str | PathLike[str], download: bool = False) -> Dataset:
    """The training and test part of a torchvision set, such as "MNIST", kept under `root`.

    Inputs are float32 [N, C, H, W] in [0, 1]. Nothing is downloaded unless `download` is true.

    Raises DataError for unknown names, sets without a training part and files not found.
    """
    sets = require("torchvision.datasets", "torchvision", "from_torchvision")
    make = getattr(sets, name, None) if name in sets.__all__ else None
    if make is None:
        close = get_close_matches(name.lower(), {known.lower() for known in sets.__all__})
        near = [known for known in sets.__all__ if known.lower() in close]
        hint = f"; close names are {', '.join(map(repr, near))}" if near else ""
        raise DataError(f"torchvision has no set {name!r}{hint}")
    train, test = (_torchvision_part(make, name, root, part, download) for part in (True, False))
    return from_torch(train, test=test, name=name)


def _torchvision_part(
    make: Any, name: str, root: str | PathLike[str], train: bool, download: bool
) -> Any:
    known = signature(make).parameters
    # A set that passes options on to its parent class takes them by name only.
    fetches = "download" in known or any(p.kind is p.VAR_KEYWORD for p in known.values())
    options: dict[str, Any] = {"download": download} if fetches else {}
    if "train" in known:
        options["train"] = train
    elif "split" in known:
        options["split"] = _train_split(known["split"].default) if train else "test"
    else:
        raise DataError(
            f"{name}: torchvision gives this set without a training and a test part; "
            "make its datasets yourself and use from_torch"
        )
    try:
        return make(root, **options)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        hint = " (download=True would fetch it)" if fetches and not download else ""
        raise DataError(f"{name}: torchvision cannot open the set: {error}{hint}") from error


def _train_split(default: object) -> str:
    """The name of the training part; some sets have a "trainval" in its place."""
    return default if isinstance(default, str) and default.startswith("train") else "train"


def _pair(dataset: Any, name: str) -> tuple[Array, Array]:
    """Inputs [N, ...] and labels [N, ...] of a dataset."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        hint = "give its .dataset" if hasattr(dataset, "dataset") else "collect its items first"
        raise DataError(
            f"{name}: from_torch takes a dataset with a length and numbered items, "
            f"not {type(dataset).__name__!r}; {hint}"
        )
    if len(dataset) == 0:
        raise DataError(f"{name}: there are no examples")
    whole = _whole(dataset, name)
    return _looped(dataset, name) if whole is None else whole


def _whole(dataset: Any, name: str) -> tuple[Array, Array] | None:
    """What a dataset holds in memory, if that is known to be what its items are."""
    data = require("torch.utils.data", "torch", "from_torch")
    # Subclasses may change their items, so only the very classes are known.
    if type(dataset) is data.TensorDataset:
        if len(dataset.tensors) != 2:
            raise DataError(
                f"{name}: a TensorDataset of inputs and labels has 2 tensors, "
                f"not {len(dataset.tensors)}"
            )
        return _array(dataset.tensors[0]), _array(dataset.tensors[1])
    if type(dataset) is data.Subset:
        whole = _whole(dataset.dataset, name)
        rows = np.asarray(dataset.indices, dtype=np.int64)
        return None if whole is None else (whole[0][rows], whole[1][rows])
    return _stored(dataset, name)


def _stored(dataset: Any, name: str) -> tuple[Array, Array] | None:
    """The `data` and `targets` of a torchvision-like set without transforms."""
    stored = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    hooks = (
        getattr(dataset, hook, None) for hook in ("transform", "target_transform", "transforms")
    )
    if any(part is None for part in stored) or any(hook is not None for hook in hooks):
        return None
    try:
        x, y = _array(stored[0]), _array(stored[1])
    except (ValueError, TypeError):
        return None
    if not len(x) == len(y) == len(dataset):
        return None
    pictured = x.dtype == np.uint8 and x.ndim in (3, 4)
    for make in (channels_first, np.asarray) if pictured else (np.asarray,):
        if all(_agrees(dataset, at, make(x[[at]]), y[at], name) for at in (0, len(x) - 1)):
            return make(x), y
    return None


def _agrees(dataset: Any, at: int, x: Array, y: Any, name: str) -> bool:
    """Whether an item is what its stored input [1, ...] and label say."""
    item_x, item_y = _item(dataset, at, name)
    return np.array_equal(_array(item_x), x[0]) and np.array_equal(_label(item_y), y)


def _looped(dataset: Any, name: str) -> tuple[Array, Array]:
    first = _array(_item(dataset, 0, name)[0])
    inputs = np.empty((len(dataset), *first.shape), dtype=first.dtype)
    labels = []
    for at in range(len(dataset)):
        item, label = _item(dataset, at, name)
        values = _array(item)
        if values.shape != first.shape:
            raise DataError(
                f"{name}: item {at} has shape {values.shape}, item 0 has {first.shape}; "
                "bring them to one shape with a transform"
            )
        inputs[at] = values
        labels.append(_label(label))
    # Beside text NumPy would make text of numbers, too.
    named = any(isinstance(label, str) for label in labels)
    return inputs, np.array(labels, dtype=object) if named else np.asarray(labels)


def _item(dataset: Any, at: int, name: str) -> tuple[Any, Any]:
    item = dataset[at]
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(
            f"{name}: item {at} is {type(item).__name__!r}{size}, but from_torch takes "
            "(input, label) pairs; wrap the dataset so that it gives them"
        )
    return item[0], item[1]


def _array(values: Any) -> Array:
    """A tensor, picture, array or list as an array; only pictures change their values."""
    if hasattr(values, "getbands"):
        return _picture(values)
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def _picture(image: Any) -> Array:
    # The bytes of a palette picture are numbers of colours.
    pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    planes: Array = channels_first(pixels[np.newaxis])[0]
    return planes


def _label(label: Any) -> Any:
    """A label as a number, array or whatever else it is, but no tensor."""
    if not hasattr(label, "detach"):
        return label
    return label.item() if label.ndim == 0 else _array(label)


def _class_names(
    dataset: Any, y: Array, task: Task | str | None, classes: int | None
) -> tuple[str, ...]:
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    whole = y.dtype.kind in "iu" and y.size == len(y) > 0
    if not may_be_labels(task) or not whole or not isinstance(names, list | tuple):
        return ()
    if classes not in (None, len(names)):
        raise DataError(
            f"the set names {len(names)} classes ({', '.join(map(str, names[:5]))}), and not "
            f"{classes}: where sites lack classes, give all of them the same names and labels, as "
            "from_arrays(x, labels as text, class_names=(all of them))"
        )
    if len(names) <= y.max():
        return ()
    return tuple(str(text) for text in names)
