"""Sources: the same data through every library gives the same data set, and every refusal."""

from __future__ import annotations

import datetime
import decimal
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.data.dataset import Dataset
from atoll.data.encoding.kinds import MARKS
from atoll.data.encoding.values import plain
from atoll.data.examples import Examples
from atoll.data.sources import (
    from_arrays,
    from_huggingface,
    from_sklearn,
    from_table,
    from_torch,
    from_torchvision,
)
from atoll.errors import DataError, MissingPackage

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2])


def same(left: Dataset, right: Dataset) -> None:
    """Two data sets are equal but for their name and description."""
    np.testing.assert_array_equal(left.x, right.x)
    np.testing.assert_array_equal(left.y, right.y)
    assert (left.x.dtype, left.y.dtype) == (right.x.dtype, right.y.dtype)
    assert (left.task.name, left.classes, left.class_names) == (
        right.task.name,
        right.classes,
        right.class_names,
    )
    assert left.keys.keys() == right.keys.keys()
    for key in left.keys:
        np.testing.assert_array_equal(left.keys[key], right.keys[key])
    assert (left.test is None) == (right.test is None)
    if left.test is not None and right.test is not None:
        for own, other in zip(left.test.all(), right.test.all(), strict=True):
            np.testing.assert_array_equal(own, other)


# Arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "task", "classes"),
    [
        (Y, "classification", 3),
        (Y.astype(np.uint8), "classification", 3),
        (Y.tolist(), "classification", 3),
        (Y == 1, "classification", 2),
        (np.zeros(6, bool), "classification", 2),
        (Y / 2, "regression", None),
        (Y.astype(np.float16), "regression", None),
        (np.stack([Y, Y], 1) / 2, "regression", None),
    ],
)
def test_the_task_follows_from_the_targets(y: Any, task: str, classes: int | None) -> None:
    dataset = from_arrays(X, y)
    assert (dataset.task.name, dataset.classes) == (task, classes)
    assert dataset.x.dtype == np.float32
    assert dataset.y.dtype == (np.int64 if task == "classification" else np.float32)
    np.testing.assert_array_equal(dataset.y, np.asarray(y))


@pytest.mark.parametrize(
    "y",
    [
        ["b", "a", "ü", "b", "a", "ü"],
        np.array(["b", "a", "ü", "b", "a", "ü"], dtype=object),
        [text.encode() for text in ["b", "a", "ü", "b", "a", "ü"]],
        np.array(["b", "a", "ü", "b", "a", "ü"], dtype=np.dtypes.StringDType()),
    ],
)
def test_text_labels_become_sorted_class_names(y: Any) -> None:
    dataset = from_arrays(X, y, test=(X[:2], y[:2]))
    assert dataset.class_names == ("a", "b", "ü")
    assert dataset.y.tolist() == [1, 0, 2, 1, 0, 2]
    assert dataset.classes == 3
    assert dataset.test is not None
    assert dataset.test.y.tolist() == [1, 0]


def test_class_names_may_be_given_in_another_order() -> None:
    dataset = from_arrays(X[:2], ["b", "a"], class_names=["b", "c", "a"])
    assert dataset.y.tolist() == [0, 2]
    assert dataset.classes == 3
    assert from_arrays(X, Y, class_names="uvwx").classes == 4


def test_objects_that_are_numbers_are_numbers() -> None:
    assert from_arrays(X, np.array(Y.tolist(), dtype=object)).classes == 3
    assert from_arrays(X, np.array([1, 2.5, 3, 4, 5, 6], dtype=object)).task.name == "regression"


def test_arrays_are_shared_or_made_writable() -> None:
    assert np.shares_memory(from_arrays(X, Y).x, X)
    frozen = X.copy()
    frozen.flags.writeable = False
    dataset = from_arrays(frozen, Y)
    assert dataset.x.flags.writeable
    assert not np.shares_memory(dataset.x, frozen)


def test_a_test_part_and_keys_come_along() -> None:
    keys = {"site": ["a", "b"] * 3}
    dataset = from_arrays(X, Y, keys=keys, test=(X[:2], [3, 0]), name="mine")
    assert dataset.name == "mine"
    assert dataset.classes == 4, "the test part counts"
    assert dataset.keys["site"].tolist() == keys["site"]
    assert dataset.test is not None
    assert len(dataset.test) == 2
    again = from_arrays(X, Y, keys=keys, test=Examples(X, Y + 1, np.array([2, 0])))
    assert again.test is not None
    np.testing.assert_array_equal(again.test.x, X[[2, 0]])
    assert again.classes == 4


def test_tokens_are_whole_and_share_one_vocabulary() -> None:
    tokens = np.arange(12).reshape(3, 4)
    dataset = from_arrays(tokens, tokens + 1, task="tokens")
    assert dataset.x.dtype == dataset.y.dtype == np.int64
    assert dataset.classes == 13
    assert from_arrays(tokens, tokens, task="tokens", classes=50).classes == 50


def test_many_classes_are_asked_for() -> None:
    assert from_arrays(X, [0, 0, 0, 0, 0, 999]).classes == 1000
    assert from_arrays(X, [0, 0, 0, 0, 0, 2000], classes=2001).classes == 2001
    assert from_arrays(X, [0, 0, 0, 0, 0, 2000], task="regression").classes is None


class Sparse:
    nnz = 0

    def toarray(self) -> None: ...


BIG = [0, 0, 0, 0, 0, 123456]
TWICE = np.stack([Y, Y], 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": X[:5]}, "arrays: 5 inputs but 6 targets"),
        ({"x": X[:0], "y": Y[:0]}, "arrays: there are no examples"),
        ({"x": X[:, 0]}, r"give them a second dimension, as in x.reshape\(-1, 1\)"),
        ({"x": 3.0}, "the inputs are 'float', not an array of examples"),
        ({"x": Sparse()}, r"the inputs are a sparse matrix; make it dense with .toarray\(\)"),
        ({"x": [[1], [1, 2]]}, "the inputs do not become one array: "),
        ({"x": X.astype(str)}, "inputs have dtype <U32; encode them as numbers first"),
        ({"x": X + np.nan}, r"6 of 6 inputs hold NaN or infinity \(first at row 0\)"),
        ({"x": np.full((6, 1), 1e300)}, "inputs hold NaN or infinity"),
        ({"y": TWICE}, r"whole targets of shape \(6, 2\) may mean several tasks; say"),
        ({"y": TWICE, "task": "classification"}, r"must have shape \[N\], not \(6, 2\); flatten"),
        ({"y": TWICE.astype(str)}, r"text labels must have shape \[N\], not \(6, 2\)"),
        ({"y": TWICE, "task": "tokens"}, r"of one shape \[N, T\], not \(6, 3\) and \(6, 2\)"),
        ({"y": Y + 0j}, "targets have dtype complex128; give numbers, or text"),
        ({"y": Y.astype("datetime64[D]")}, r"targets have dtype datetime64\[D\]; give numbers"),
        ({"y": [datetime.date(2020, 1, 1)] * 6}, "the targets are date objects; turn them into"),
        ({"y": ["a", None, "b", np.nan, "c", "d"]}, "2 of 6 targets are missing; drop these"),
        ({"y": ["a", "b", "c", "d", "e", np.nan]}, "1 of 6 targets are missing; drop these"),
        ({"y": ["a", "b", "c", "d", "e", 1]}, "the targets mix int and str; make them all one"),
        (
            {"y": np.array(["a", 1, "b", 2, 3, 4], dtype=object)},
            "the targets mix int and str; make them all one kind",
        ),
        ({"y": Y * np.nan, "task": "classification"}, "the labels hold NaN or infinity"),
        ({"y": Y / 2, "task": "classification"}, "labels must be whole numbers, not float64"),
        ({"y": Y / 2, "classes": 3}, "classes=3 does not go with regression; if the targets are"),
        ({"y": list("abcabc"), "task": "regression"}, "text, which task='regression' cannot use"),
        ({"y": Y - 1}, "labels go from -1 to 1, but 2 classes allow only 0 to 1"),
        ({"y": Y, "classes": 2}, "labels go from 0 to 2, but 2 classes allow only 0 to 1"),
        ({"y": BIG}, "labels go up to 123456 in 6 examples; say task='regression'"),
        ({"y": list("abcabc"), "classes": 4}, "there are 3 class names but classes=4; give a"),
        ({"y": list("abcabc"), "class_names": "ab"}, "label 'c' is not among the 2 class names"),
        (
            {"y": list("abcdef"), "class_names": "g"},
            "labels 'a', 'b', 'c', 'd', 'e', ... are not among the 1 class names; give all",
        ),
        ({"class_names": "aab"}, "a class name is given twice; every class needs its own"),
        ({"task": "clustering"}, "task must be one of classification, regression, tokens, multi"),
        ({"keys": {"site": ["a"]}}, "key 'site' has 1 values for 6 examples"),
        ({"keys": {"site": TWICE}}, r"key 'site' must have shape \[N\], not \(6, 2\)"),
        ({"test": X}, r"arrays, test part: give the test part as a pair \(x, y\)"),
        ({"test": (X[:2], Y)}, "arrays, test part: 2 inputs but 6 targets"),
        ({"test": (X[:, :2], Y)}, r"test part: inputs have shape \(2,\) each, but \(3,\) in"),
        ({"test": (X, list("abcabc"))}, "test part: labels are text in one part and numbers"),
        (
            {"y": list("ababab"), "test": (X, list("abcabc"))},
            "arrays, test part: label 'c' is not among the 2 class names; give all of them",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    arguments = {"x": X, "y": Y, **arguments}
    with pytest.raises(DataError, match=sentence):
        from_arrays(**arguments)


# scikit-learn -------------------------------------------------------------------------------


def test_bunches_of_scikit_learn() -> None:
    sets = pytest.importorskip("sklearn.datasets")
    iris = from_sklearn(sets.load_iris())
    assert iris.name == "iris"
    assert iris.describe == "Iris plants dataset"
    assert iris.class_names == ("setosa", "versicolor", "virginica")
    assert (iris.x.shape, iris.classes, iris.task.name) == ((150, 4), 3, "classification")
    np.testing.assert_array_equal(iris.x, sets.load_iris().data.astype(np.float32))
    digits = from_sklearn(sets.load_digits())
    assert (digits.x.shape, digits.classes, digits.name) == ((1797, 64), 10, "sklearn")
    diabetes = from_sklearn(sets.load_diabetes(), name="mine")
    assert (diabetes.task.name, diabetes.class_names, diabetes.name) == ("regression", (), "mine")
    assert from_sklearn(sets.load_linnerud()).y.shape == (20, 3)


@pytest.mark.parametrize("loader", ["load_iris", "load_diabetes", "load_wine", "load_linnerud"])
def test_frames_of_scikit_learn_are_the_same(loader: str) -> None:
    load = getattr(pytest.importorskip("sklearn.datasets"), loader)
    pytest.importorskip("pandas")
    same(from_sklearn(load(as_frame=True)), from_sklearn(load()))


def test_frames_with_categories_are_encoded() -> None:
    pandas = pytest.importorskip("pandas")
    bunch_of = pytest.importorskip("sklearn.utils").Bunch
    pytest.importorskip("pyarrow")
    data = pandas.DataFrame({"age": [1, 2, 3], "sex": pandas.Categorical(["m", "f", "m"])})
    target = pandas.Series(["sick", "well", "sick"], dtype="category", name="class")
    bunch = bunch_of(data=data, target=target, target_names=["class"], details={"name": "heart"})
    dataset = from_sklearn(bunch)
    assert dataset.name == "heart"
    assert dataset.x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1]]
    assert dataset.class_names == ("sick", "well")
    for test in (bunch_of(data=data[:2], target=target[:2]), (data[:2], target[:2])):
        held_out = from_sklearn(bunch, test=test).test
        assert held_out is not None
        np.testing.assert_array_equal(held_out.x, dataset.x[:2])
        np.testing.assert_array_equal(held_out.y, [0, 1])


def test_nullable_numbers_in_a_frame_are_read() -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    data = pandas.DataFrame({"a": pandas.array([1, 2], dtype="Int64")})
    assert from_sklearn({"data": data, "target": [0, 1]}).x.tolist() == [[1], [2]]


def test_names_that_are_no_class_names_are_left_out() -> None:
    bunch = {"data": X, "target": Y, "target_names": ["class"]}
    assert from_sklearn(bunch).class_names == ()
    bunch = {"data": X, "target": Y, "target_names": list("abcd")}
    assert from_sklearn(bunch).classes == 4
    assert from_sklearn(bunch, classes=3).class_names == ()
    assert from_sklearn(bunch, task="regression").class_names == ()
    test = from_sklearn(bunch, test={"data": X[:1], "target": Y[:1]}).test
    assert test is not None
    assert len(test) == 1


def test_bunches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="takes a bunch with data and target, not 'tuple'; for a"):
        from_sklearn((X, Y))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the bunch has no 'target'; load it with its target"):
        from_sklearn({"data": X, "target": None})


# PyTorch ------------------------------------------------------------------------------------


class Pairs:
    """A map-style dataset of given pairs."""

    def __init__(self, *pairs: Any, **attributes: Any) -> None:
        self.pairs = pairs
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, at: int) -> Any:
        return self.pairs[at]


class Stored:
    """Like torchvision's MNIST or CIFAR-10: pictures in `data`, labels in `targets`."""

    def __init__(self, data: Any, targets: Any, transform: Any = None, lie: int = 0) -> None:
        self.data, self.targets, self.transform = data, targets, transform
        self.lie, self.reads = lie, 0
        self.classes = ["zero", "one", "two"]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        self.reads += 1
        image = pytest.importorskip("PIL.Image").fromarray(np.asarray(self.data[at]))
        image = self.transform(image) if self.transform else image
        return image, int(self.targets[at]) + self.lie


def test_tensors_are_read_whole() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    tensors = data.TensorDataset(x, y)
    same(from_torch(tensors), from_arrays(X, Y))
    assert np.shares_memory(from_torch(tensors).x, X)
    subset = data.Subset(data.Subset(tensors, [5, 3, 1]), [2, 0])
    same(from_torch(subset, classes=3), from_arrays(X[[1, 5]], Y[[1, 5]], classes=3))
    floats = data.TensorDataset(x.double().requires_grad_(), y / 2)
    same(from_torch(floats), from_arrays(X, Y / 2))
    halves = data.TensorDataset(x.bfloat16(), y)
    same(from_torch(halves), from_arrays(x.bfloat16().float().numpy(), Y))
    tokens = data.TensorDataset(torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
    assert from_torch(tokens, task="tokens", classes=9).x.dtype == np.int64


def test_changed_items_are_not_read_whole() -> None:
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")

    class Doubled(data.TensorDataset):  # type: ignore[name-defined,misc]
        def __getitem__(self, at: int) -> Any:
            x, y = super().__getitem__(at)
            return 2 * x, y

    doubled = Doubled(torch.from_numpy(X), torch.from_numpy(Y))
    same(from_torch(doubled), from_arrays(2 * X, Y))
    same(from_torch(data.Subset(doubled, [4, 5])), from_arrays(2 * X[4:], Y[4:]))


def test_items_of_any_kind_are_looped_over() -> None:
    torch = pytest.importorskip("torch")
    tensors = [(torch.from_numpy(x).requires_grad_(), torch.tensor(y)) for x, y in zip(X, Y)]  # noqa: B905
    same(from_torch(Pairs(*tensors)), from_arrays(X, Y))
    arrays = [[x, y] for x, y in zip(X, Y, strict=True)]
    same(
        from_torch(Pairs(*arrays), test=Pairs(*arrays[:2])), from_arrays(X, Y, test=(X[:2], Y[:2]))
    )
    named = Pairs(*((x.tolist(), "ab"[y % 2]) for x, y in zip(X, Y, strict=True)))
    same(from_torch(named, keys={"k": Y}), from_arrays(X, ["ab"[y % 2] for y in Y], keys={"k": Y}))
    several = Pairs(*((x, torch.from_numpy(x)) for x in X))
    same(from_torch(several), from_arrays(X, X))
    half = Pairs(*((torch.from_numpy(x).bfloat16(), 0.5) for x in X))
    assert from_torch(half).task.name == "regression"


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 8, 6, 3)])
@pytest.mark.parametrize("tensor", [False, True])
def test_stored_pictures_are_read_whole(shape: tuple[int, ...], tensor: bool) -> None:
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    labels = [0, 1, 2, 0, 1]
    stored = Stored(torch.from_numpy(pixels) if tensor else pixels, labels)
    dataset = from_torch(stored)
    assert stored.reads == 2, "two items are compared, none other is read"
    planes = pixels.reshape(5, 8, 6, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.x, planes.astype(np.float32) / np.float32(255))
    assert dataset.class_names == ("zero", "one", "two")
    looped = Stored(pixels, labels, transform=lambda image: image)
    same(from_torch(looped), dataset)
    assert looped.reads > 5
    part = from_torch(torch.utils.data.Subset(stored, [3, 4]))
    np.testing.assert_array_equal(part.x, dataset.x[3:])
    assert part.class_names == ("zero", "one", "two")


def test_stored_data_that_items_do_not_show_is_not_believed() -> None:
    pytest.importorskip("torch")
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(from_torch(Stored(pixels, [0, 1], lie=1)).y, [1, 2])
    flipped = Stored(pixels, [0, 1], transform=lambda image: np.flipud(np.asarray(image)))
    np.testing.assert_array_equal(from_torch(flipped).x, pixels[:, ::-1])
    for data, targets in (([[1], [1, 2]], [0, 1]), (pixels, [0]), (X, Y)):
        odd = Pairs(*((x, 0) for x in X), data=data, targets=targets)
        assert from_torch(odd).y.tolist() == [0] * 6
    plain = Pairs(*zip(X, Y, strict=True), data=X, targets=Y.tolist())
    same(from_torch(plain), from_arrays(X, Y))


@pytest.mark.parametrize(
    ("mode", "shape", "largest"),
    [("L", (1,), 1), ("RGB", (3,), 1), ("RGBA", (4,), 1), ("P", (3,), 1), ("1", (1,), 1)],
)
def test_pictures_of_all_modes(mode: str, shape: tuple[int, ...], largest: float) -> None:
    pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 5), "white").convert(mode)
    dataset = from_torch(Pairs((image, 0), (image, 1)))
    assert dataset.shape == (*shape, 5, 4)
    assert dataset.x.min() == dataset.x.max() == largest


def test_pictures_are_as_torchvision_makes_them() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    image = pytest.importorskip("PIL.Image").fromarray(pixels)
    expected = functional.to_tensor(image).numpy()
    np.testing.assert_array_equal(from_torch(Pairs((image, 0))).x[0], expected)


def test_class_names_of_a_dataset_must_fit() -> None:
    pytest.importorskip("torch")
    pairs = list(zip(X, Y, strict=True))
    assert from_torch(Pairs(*pairs, classes=list("abc"))).class_names == ("a", "b", "c")
    assert from_torch(Pairs(*pairs, classes=list("ab"))).class_names == ()
    with pytest.raises(DataError, match="names 3 classes .*, and not 5"):
        from_torch(Pairs(*pairs, classes=list("abc")), classes=5)
    assert from_torch(Pairs(*pairs, classes=7)).classes == 3
    assert from_torch(Pairs(*pairs, classes=list("abc")), task="regression").class_names == ()


def test_torch_datasets_that_do_not_fit_are_refused() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    tensors = data.TensorDataset(torch.from_numpy(X))

    class Stream(data.IterableDataset):  # type: ignore[name-defined,misc]
        def __iter__(self) -> Any:
            return iter(zip(X, Y, strict=True))

    refusals = [
        (tensors, "a TensorDataset of inputs and labels has 2 tensors, not 1"),
        (Stream(), "takes a dataset with a length and numbered items, not 'Stream'; collect its"),
        (data.DataLoader(tensors), "not 'DataLoader'; give its .dataset"),
        (Pairs(), "torch: there are no examples"),
        (Pairs({"x": 1}), r"item 0 is 'dict', but from_torch takes \(input, label\) pairs"),
        (Pairs((X[0], 0), (X[0], 0, 1)), "item 1 is 'tuple' of 3, but from_torch takes"),
        (Pairs((X[0], 0), (X[0, :2], 0)), r"item 1 has shape \(2,\), item 0 has \(3,\); bring"),
        (Pairs((X[0], 0), (X[0], "a")), "the targets mix int and str; make them all one kind"),
    ]
    for dataset, sentence in refusals:
        with pytest.raises(DataError, match=sentence):
            from_torch(dataset)
    with pytest.raises(DataError, match="torch, test part: there are no examples"):
        from_torch(Pairs((X[0], 0)), test=Pairs())


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for torchvision with one set of every make."""
    pytest.importorskip("torch")
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    folder = ModuleType("torchvision")
    sets = ModuleType("torchvision.datasets")

    def numbers(root: str, train: bool = True, download: bool = False) -> Stored:
        if root == "empty" and not download:
            raise RuntimeError("Dataset not found.")
        return Stored(pixels if train else pixels[:1], [0, 1, 2] if train else [0])

    def streets(root: str, split: str = "trainval") -> Stored:
        return numbers(root, {"trainval": True, "test": False}[split], True)

    def writers(root: str, split: str, **options: Any) -> Stored:
        return numbers(root, {"train": True, "test": False}[split], **options)

    def alone(root: str) -> Stored:
        return numbers(root)

    sets.__dict__.update(MNIST=numbers, Streets=streets, Writers=writers, Alone=alone)
    sets.__dict__.update(__all__=["MNIST", "Streets", "Writers", "Alone"], Hidden=numbers)
    folder.__dict__["datasets"] = sets
    monkeypatch.setitem(sys.modules, "torchvision", folder)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", sets)
    return sets


@pytest.mark.parametrize("name", ["MNIST", "Streets", "Writers"])
def test_torchvision_sets_come_by_name(torchvision: ModuleType, name: str, tmp_path: Path) -> None:
    dataset = from_torchvision(name, tmp_path)
    assert (dataset.name, dataset.shape, dataset.classes) == (name, (1, 4, 4), 3)
    assert dataset.test is not None
    assert len(dataset.test) == 1


def test_torchvision_refusals(torchvision: ModuleType) -> None:
    with pytest.raises(DataError, match="torchvision has no set 'mnist'; close names are 'MNIST'"):
        from_torchvision("mnist", "root")
    with pytest.raises(DataError, match=r"torchvision has no set 'Hidden'$"):
        from_torchvision("Hidden", "root")
    with pytest.raises(DataError, match="Alone: torchvision gives this set without a training"):
        from_torchvision("Alone", "root")
    with pytest.raises(DataError, match=r"Dataset not found. \(download=True would fetch it\)"):
        from_torchvision("MNIST", "empty")
    assert len(from_torchvision("MNIST", "empty", download=True)) == 3


def test_torchvision_itself_reads_its_files(tmp_path: Path) -> None:
    pytest.importorskip("torchvision.datasets")
    pixels = np.random.default_rng(1).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = b"\0\0\x08\x03" + np.array([5, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = b"\0\0\x08\x01" + np.array([5], ">i4").tobytes() + bytes([0, 1, 2, 3, 9])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    dataset = from_torchvision("MNIST", tmp_path)
    np.testing.assert_array_equal(dataset.x[:, 0], pixels.astype(np.float32) / np.float32(255))
    assert (dataset.y.tolist(), dataset.classes) == ([0, 1, 2, 3, 9], 10)
    assert dataset.class_names[0] == "0 - zero"
    with pytest.raises(DataError, match="download=True would fetch it"):
        from_torchvision("CIFAR10", tmp_path)


# Tables -------------------------------------------------------------------------------------

COLUMNS: dict[str, list[Any]] = {
    "age": [30, 41, 25, 60],
    "weight": [60.5, 80.25, 71.0, 90.125],
    "smokes": [True, False, False, True],
    "blood": ["b", "ab", "0", "b"],
    "hospital": ["east", "west", "east", "south"],
    "ward": [3, 1, 2, 3],
    "outcome": ["well", "sick", "well", "sick"],
}
INPUTS = [
    [30, 60.5, 0, 1, 0, 0, 1],
    [41, 80.25, 1, 0, 0, 1, 0],
    [25, 71.0, 1, 0, 1, 0, 0],
    [60, 90.125, 0, 1, 0, 0, 1],
]


def as_pandas(columns: dict[str, Any], tmp_path: Path) -> Any:
    return pytest.importorskip("pandas").DataFrame(columns)


def as_pandas_indexed(columns: dict[str, Any], tmp_path: Path) -> Any:
    frame = as_pandas(columns, tmp_path)
    return frame.set_index(frame.index[::-1])


def as_pandas_categories(columns: dict[str, Any], tmp_path: Path) -> Any:
    pandas = pytest.importorskip("pandas")
    text = {name: values for name, values in columns.items() if isinstance(values[0], str)}
    unused = {
        name: pandas.Categorical(values, categories=["zz", *sorted(set(values), reverse=True)])
        for name, values in text.items()
    }
    return pandas.DataFrame({**columns, **unused})


def as_polars(columns: dict[str, Any], tmp_path: Path) -> Any:
    return pytest.importorskip("polars").DataFrame(columns)


def as_polars_categories(columns: dict[str, Any], tmp_path: Path) -> Any:
    polars = pytest.importorskip("polars")
    return polars.DataFrame(columns).with_columns(
        polars.col(polars.String).cast(polars.Categorical)
    )


def as_polars_enums(columns: dict[str, Any], tmp_path: Path) -> Any:
    polars = pytest.importorskip("polars")
    text = {name: values for name, values in columns.items() if isinstance(values[0], str)}
    return polars.DataFrame(columns).with_columns(
        polars.col(name).cast(polars.Enum(sorted(set(values), reverse=True)))
        for name, values in text.items()
    )


def as_arrow(columns: dict[str, Any], tmp_path: Path) -> Any:
    return pytest.importorskip("pyarrow").table(columns)


def as_arrow_chunks(columns: dict[str, Any], tmp_path: Path) -> Any:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns)
    for at, name in enumerate(table.column_names):
        if arrow.types.is_string(table[name].type):
            # Every chunk has a dictionary of its own.
            table = table.set_column(at, name, table[name].dictionary_encode())
    return arrow.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1)])


def as_arrow_stream(columns: dict[str, Any], tmp_path: Path) -> Any:
    return as_arrow(columns, tmp_path).to_reader(max_chunksize=3)


def as_arrow_batch(columns: dict[str, Any], tmp_path: Path) -> Any:
    return as_arrow(columns, tmp_path).to_batches()[0]


def as_duckdb(columns: dict[str, Any], tmp_path: Path) -> Any:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.connect().from_arrow(as_arrow(columns, tmp_path))


def as_huggingface(columns: dict[str, Any], tmp_path: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def as_huggingface_shuffled(columns: dict[str, Any], tmp_path: Path) -> Any:
    backwards = {name: values[::-1] for name, values in columns.items()}
    return as_huggingface(backwards, tmp_path).select(range(len(columns["age"]))[::-1])


def as_csv(columns: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "patients.csv"
    as_pandas(columns, tmp_path).to_csv(path, index=False)
    return path


def as_arrow_csv(columns: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "patients.CSV"
    pytest.importorskip("pyarrow.csv").write_csv(as_arrow(columns, tmp_path), path)
    return str(path)


def as_parquet(columns: dict[str, Any], tmp_path: Path) -> Any:
    folder = tmp_path / "year=2020"
    folder.mkdir(exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(
        as_arrow_chunks(columns, tmp_path), folder / "patients.parquet"
    )
    return folder / "patients.parquet"


def as_pandas_parquet(columns: dict[str, Any], tmp_path: Path) -> Any:
    as_pandas_indexed(columns, tmp_path).to_parquet(tmp_path / "patients.parquet")
    return str(tmp_path / "patients.parquet")


MAKERS = [
    as_pandas,
    as_pandas_indexed,
    as_pandas_categories,
    as_polars,
    as_polars_categories,
    as_polars_enums,
    as_arrow,
    as_arrow_chunks,
    as_arrow_stream,
    as_arrow_batch,
    as_duckdb,
    as_huggingface,
    as_huggingface_shuffled,
    as_csv,
    as_arrow_csv,
    as_parquet,
    as_pandas_parquet,
]
Maker = Callable[[dict[str, Any], Path], Any]


@pytest.mark.parametrize("make", MAKERS)
def test_a_table_is_the_same_from_every_library(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    dataset = from_table(
        make(COLUMNS, tmp_path), label="outcome", client=("hospital", "ward"), name="patients"
    )
    np.testing.assert_array_equal(dataset.x, np.array(INPUTS, dtype=np.float32))
    assert (dataset.name, dataset.class_names) == ("patients", ("sick", "well"))
    assert dataset.y.tolist() == [1, 0, 1, 0]
    assert dataset.keys["hospital"].tolist() == COLUMNS["hospital"]
    assert dataset.keys["ward"].tolist() == COLUMNS["ward"]
    assert dataset.describe == "4 columns of patients as 7 inputs, label 'outcome'"
    assert dataset.x.flags.writeable
    assert dataset.y.flags.writeable


@pytest.mark.parametrize("make", MAKERS)
def test_a_test_part_is_encoded_as_the_training_part(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    odd = {**COLUMNS, "blood": ["b", "unheard of", "0", "b"]}
    (tmp_path / "test").mkdir()
    dataset = from_table(
        make(COLUMNS, tmp_path),
        label="outcome",
        features=["blood", "age"],
        test=make(odd, tmp_path / "test"),
    )
    assert dataset.test is not None
    assert dataset.x[:, 3].tolist() == COLUMNS["age"]
    assert dataset.test.x[:, :3].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert dataset.test.y.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "make", [as_pandas, as_polars, as_arrow, as_duckdb, as_huggingface, as_csv, as_parquet]
)
def test_missing_values_are_filled_and_flagged(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    holes = {
        **COLUMNS,
        "age": [30, None, 25, None],
        "weight": [None, 80.25, 71.0, 90.25],
        "blood": ["b", None, "0", "b"],
    }
    (tmp_path / "train").mkdir()
    source = make(holes, tmp_path / "train")
    for column, count in (("age", 2), ("weight", 1), ("blood", 1)):
        sentence = f"column '{column}' has {count} missing values? of 4; fill or drop them first"
        with pytest.raises(DataError, match=sentence + ", or say missing='indicator'"):
            from_table(source, label="outcome", features=column)
    dataset = from_table(
        source,
        label="outcome",
        features=["age", "weight", "blood", "ward"],
        missing="indicator",
        test=make({**COLUMNS, "ward": [1, None, 2, 3]}, tmp_path),
    )
    assert dataset.x.tolist() == [
        [30, 0, 80.5, 1, 0, 1, 0, 3],
        [27.5, 1, 80.25, 0, 0, 0, 1, 1],
        [25, 0, 71, 0, 1, 0, 0, 2],
        [27.5, 1, 90.25, 0, 0, 1, 0, 3],
    ]
    assert dataset.test is not None
    assert dataset.test.x[1].tolist() == [41, 0, 80.25, 0, 0, 0, 0, 2.25]
    test = from_table(source, label="outcome", features="ward", test=source).test
    assert test is not None


def test_nan_is_missing_too() -> None:
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = polars.DataFrame({"a": [1.0, float("nan"), None], "y": [0, 1, 1]})
    with pytest.raises(DataError, match="table: column 'a' has 2 missing values of 3; fill or"):
        from_table(frame, label="y")
    assert from_table(frame, label="y", missing="indicator").x.tolist() == [[1, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("make", [as_pandas, as_polars, as_arrow, as_duckdb, as_huggingface])
def test_lists_become_blocks(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = make(
        {
            "age": [1, 2, 3],
            "wave": [[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]],
            "on": [[True, False], [False, False], [True, True]],
            "next": [[1, 2], [2, 3], [3, 4]],
            "now": [[0, 1], [1, 2], [2, 3]],
        },
        tmp_path,
    )
    dataset = from_table(source, label="wave", features=["age", "on", "now"])
    assert dataset.x.tolist() == [[1, 1, 0, 0, 1], [2, 0, 0, 1, 2], [3, 1, 1, 2, 3]]
    assert (dataset.task.name, dataset.y.shape) == ("regression", (3, 2))
    tokens = from_table(source, label="next", features=["now"], task="tokens")
    assert (tokens.classes, tokens.x.dtype) == (5, np.int64)
    assert tokens.x.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_lists_of_every_arrow_type() -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [[1.5, 2.5], [3.5, 4.5], [5.5, 6.5], [7.5, 8.5]]
    kinds = [
        arrow.list_(arrow.float32()),
        arrow.large_list(arrow.float64()),
        arrow.list_(arrow.float16(), 2),
        arrow.list_(arrow.decimal128(5, 2)),
        arrow.list_view(arrow.float64()),
        arrow.large_list_view(arrow.float64()),
    ]
    for kind in kinds:
        values = rows
        if arrow.types.is_decimal(kind.value_type):
            values = [[decimal.Decimal(value) for value in row] for row in rows]
        if arrow.types.is_float16(kind.value_type):
            values = [list(row) for row in np.array(rows, dtype=np.float16)]
        table = arrow.table({"a": arrow.array(values, kind), "y": [0, 1, 0, 1]})
        assert from_table(table, label="y").x.tolist() == rows
        assert from_table(table.slice(1, 2), label="y").x.tolist() == rows[1:3], kind
    nested = arrow.table({"a": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], "y": [0, 1]})
    assert from_table(nested, label="y").x.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    tensors = arrow.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2))
    table = arrow.table({"a": tensors, "y": [0, 1, 1]})
    assert from_table(table, label="y").x.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert from_table(table, label="a", features="y").y.shape == (3, 4)


def test_missing_lists_and_missing_values_in_lists() -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [[1.0, None], None, [3.0, 4.0], [5.0, 6.0]]
    for kind in (arrow.list_(arrow.float32()), arrow.list_(arrow.float32(), 2)):
        table = arrow.table({"a": arrow.array(rows, kind), "y": [0, 1, 0, 1]})
        with pytest.raises(DataError, match="column 'a' has 3 missing values of 8; fill"):
            from_table(table, label="y")
        assert from_table(table, label="y", missing="indicator").x.tolist() == [
            [1, 5, 0, 1],
            [3, 5, 1, 1],
            [3, 4, 0, 0],
            [5, 6, 0, 0],
        ]


def test_numbers_of_every_arrow_type() -> None:
    arrow = pytest.importorskip("pyarrow")
    kinds = [
        *(getattr(arrow, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *(getattr(arrow, f"float{bits}")() for bits in (16, 32, 64)),
        arrow.decimal128(30, 3),
    ]
    for kind in kinds:
        column = arrow.array([1, None, 3]).cast(kind)
        table = arrow.table({"a": column, "b": [0.0, 0, 0], "y": [0, 1, 1]})
        assert from_table(table, label="y", missing="indicator").x[:, 0].tolist() == [1, 2, 3]
        targets = from_table(table.slice(2), label="a", features="b", task="regression")
        assert targets.y.tolist() == [3]


def test_columns_of_categories_that_are_no_text() -> None:
    arrow = pytest.importorskip("pyarrow")
    numbers = arrow.array([10, 2, 10, None]).dictionary_encode()
    flags = arrow.DictionaryArray.from_arrays([0, 1, 0, 1], [True, False])
    table = arrow.table({"a": numbers, "b": flags, "y": ["u", "v", "u", "v"]})
    dataset = from_table(table, label="y", missing="indicator")
    assert dataset.x.tolist() == [
        [0, 1, 0, 0, 1],
        [1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1],
        [0, 0, 1, 1, 0],
    ]
    labelled = from_table(table.slice(0, 3), label="a", features="b")
    assert labelled.class_names == ("2", "10"), "sorted as numbers"
    assert labelled.y.tolist() == [1, 0, 1]
    owned = from_table(table, label="y", features="b", client="b")
    assert owned.keys["b"].tolist() == ["true", "false", "true", "false"]
    hollow = arrow.DictionaryArray.from_arrays([0, 1], arrow.array(["a", None]))
    table = arrow.table({"a": hollow, "b": [1, 2], "y": [0, 1]})
    uses: list[dict[str, Any]] = [
        {"label": "a", "features": "b"},
        {"label": "y"},
        {"label": "y", "client": "a", "features": "b"},
    ]
    for use in uses:
        with pytest.raises(DataError, match="column 'a' has 1 missing value of 2"):
            from_table(table, **use)
    empty = arrow.table({"a": arrow.array(["a"]).dictionary_encode(), "y": [0]}).slice(0, 0)
    for features in ("a", None):
        with pytest.raises(DataError, match="table: there are no examples"):
            from_table(empty, label="y", features=features)
    with pytest.raises(DataError, match="table: there are no examples"):
        from_table(empty, label="a")


def test_labels_of_a_table() -> None:
    arrow = pytest.importorskip("pyarrow")
    columns = {"a": [1.0, 2.0, 3.0], "whole": [0, 2, 1], "real": [0.5, 1.0, 2.0]}
    table = arrow.table({**columns, "flag": [True, False, False], "text": ["b", "a", "b"]})
    assert from_table(table, label="whole", features="a").classes == 3
    assert from_table(table, label="whole", features="a", classes=9).classes == 9
    assert from_table(table, label="whole", features="a", class_names="xyz").class_names[2] == "z"
    assert from_table(table, label="whole", features="a", task="regression").classes is None
    assert from_table(table, label="real", features="a").task.name == "regression"
    assert from_table(table, label="flag", features="a").y.tolist() == [1, 0, 0]
    assert from_table(table, label="text", features="a", class_names="ba").y.tolist() == [0, 1, 0]
    same(
        from_table(table, label="text", features="a", test=table),
        from_arrays(np.array([[1], [2], [3]]), list("bab"), test=([[1], [2], [3]], list("bab"))),
    )


def test_owners_of_a_table() -> None:
    arrow = pytest.importorskip("pyarrow")
    days = [datetime.date(2020, 1, 2), datetime.date(2021, 1, 2)]
    table = arrow.table({"a": [1, 2], "day": days, "text": ["é", "longer"], "y": [0, 1]})
    dataset = from_table(table, label="y", client=["day", "text"])
    assert dataset.keys["day"].tolist() == ["2020-01-02", "2021-01-02"]
    assert dataset.keys["text"].tolist() == ["é", "longer"]
    assert dataset.x.tolist() == [[1], [2]], "owners are no features"
    assert from_table(table, label="y", client="text", features=["a", "text"]).shape == (3,)
    assert len(dataset.by("text", test=0.0)) == 2


def test_the_index_of_pandas_is_no_feature_but_may_own(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(
        {"a": [1, 2], "y": [0, 1]}, index=pandas.Index(["u", "v"], name="site")
    )
    dataset = from_table(frame, label="y", client="site")
    assert dataset.x.tolist() == [[1], [2]]
    assert dataset.keys["site"].tolist() == ["u", "v"]
    frame.to_csv(tmp_path / "t.csv", index_label=False)
    frame.reset_index(drop=True).to_csv(tmp_path / "numbered.csv")
    with pytest.raises(DataError, match="numbered: a column has no name, as when pandas writes"):
        from_table(tmp_path / "numbered.csv", label="y")
    assert from_table(tmp_path / "numbered.csv", label="y", features=["a"]).shape == (1,)


def test_an_empty_field_is_a_missing_value(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.csv"
    for field in ("", '""', '" "'):
        path.write_text(f"a,y\n{field},0\nb,1\n")
        with pytest.raises(DataError, match="t: column 'a' has 1 missing value of 2"):
            from_table(path, label="y")
    # The type of a column is that of all its rows, not of the first block of the file.
    path.write_text("a,y\n" + "1,0\n" * 400_000 + "x,1\n")
    assert from_table(path, label="y").shape == (2,)


def test_a_test_file_may_hold_no_value_of_a_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "train.csv").write_text("a,b,y\n1,u,0\n3,v,1\n")
    (tmp_path / "test.csv").write_text("a,b,y\n,,1\n,,0\n")
    arguments: dict[str, Any] = {"label": "y", "test": tmp_path / "test.csv"}
    with pytest.raises(DataError, match="train, test part: column 'a' has 2 missing values of 2"):
        from_table(tmp_path / "train.csv", **arguments)
    dataset = from_table(tmp_path / "train.csv", **arguments, missing="indicator")
    assert dataset.test is not None
    assert dataset.test.x.tolist() == [[2, 0, 0], [2, 0, 0]]


def refusals() -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """Columns, arguments and the sentence that they are refused with."""
    good = {"a": [1.0, 2.0], "y": [0, 1]}
    clock = [datetime.datetime(2020, 1, 1)] * 2
    hollow = {"a": [None, None], "y": [0, 1]}
    return [
        (good, {"label": "Y"}, "table: there is no column 'Y'; close names are 'y'"),
        (good, {"label": "outcome"}, "there is no column 'outcome'; the columns are 'a', 'y'"),
        (good, {"features": ["aa"]}, "there is no column 'aa'; close names are 'a'"),
        (good, {"client": "hospital"}, "there is no column 'hospital'; the columns are"),
        (good, {"features": ["a", "y"]}, "the label 'y' is among the features; take it out"),
        (good, {"features": []}, "there is no column but the label and the clients to learn"),
        (good, {"client": "a"}, "there is no column but the label and the clients to learn"),
        (good, {"missing": "drop"}, "missing must be 'refuse' or 'indicator', not 'drop'"),
        (good, {"test": {"a": [1.0]}}, "table, test part: there is no column 'y'; the columns"),
        (good, {"test": {"b": [1.0], "y": [1]}}, "table, test part: there is no column 'a'"),
        (good, {"test": {"a": ["x"], "y": [1]}}, "test part: column 'a' is to be numbers, but ho"),
        (good, {"test": {"a": [[1.0, 2.0]], "y": [1]}}, "has 2 numbers per row, but 1 in the"),
        (good, {"test": {"a": [], "y": []}}, "table, test part: there are no examples"),
        (good, {"test": {"a": [1.0], "y": [None]}}, "test part: label column 'y' has 1 missing"),
        (hollow, {}, "column 'a' has 2 missing values of 2; fill"),
        (hollow, {"missing": "indicator"}, "column 'a' holds no value to take a mean of; leave"),
        ({"a": clock, "y": [0, 1]}, {}, r"column 'a' has type timestamp\[us\], which has no enc"),
        ({"a": [{"b": 1}] * 2, "y": [0, 1]}, {}, "column 'a' has type struct<b: int64>, which"),
        ({"a": [["x"]] * 2, "y": [0, 1]}, {}, "column 'a' has type list<.*string>, which has no"),
        ({"a": [[1], [1, 2]], "y": [0, 1]}, {}, "column 'a' has lists of 1 to 2 values; pad or"),
        ({"a": [[], []], "y": [0, 1]}, {}, "column 'a' has only empty lists|has type list<"),
        ({"a": [1.0, np.inf], "y": [0, 1]}, {}, "column 'a' has 1 values that are infinite or"),
        ({"a": [1.0, -1e99], "y": [0, 1]}, {}, "too large for float32; rescale the column or"),
        ({"a": np.float32([np.inf, 1]), "y": [0, 1]}, {}, "column 'a' has 1 values that are inf"),
        (
            {"a": [f"t{i}" for i in range(1001)], "y": [0] * 1001},
            {},
            "column 'a' has 1001 different values, more than the 1000 categories that become",
        ),
        ({"a": [1, 2], "y": [0, None]}, {}, "label column 'y' has 1 missing value of 2; drop the"),
        ({"a": [1, 2], "y": [0, np.nan]}, {}, "label column 'y' has 1 missing value of 2; drop"),
        ({"a": [1, 2], "y": ["u", None]}, {}, "label column 'y' has 1 missing value of 2; drop"),
        ({"a": [1, 2], "y": clock}, {}, "label column 'y' has type timestamp.*; give numbers"),
        (
            {"a": [1, 2], "y": ["u", "v"]},
            {"test": {"a": [1], "y": ["w"]}},
            "test part: label 'w' is not among the 2 class names",
        ),
        (
            {**good, "h": ["x", None]},
            {"client": "h"},
            "client column 'h' has 1 missing value of 2; every row needs an owner",
        ),
        (
            {**good, "h": [0.5, 1.5]},
            {"client": "h"},
            "client column 'h' has type double, but owners are named by text, dates or whole",
        ),
    ]


@pytest.mark.parametrize(("columns", "arguments", "sentence"), refusals())
def test_tables_that_do_not_fit_are_refused(
    columns: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    arrow = pytest.importorskip("pyarrow")
    arguments = {"label": "y", **arguments}
    if "test" in arguments:
        arguments["test"] = arrow.table(arguments["test"])
    with pytest.raises(DataError, match=sentence):
        from_table(arrow.table(columns), **arguments)


def test_columns_of_one_name_and_long_lists_of_columns() -> None:
    arrow = pytest.importorskip("pyarrow")
    double = arrow.table([[1], [2], [0]], names=["a", "a", "y"])
    with pytest.raises(DataError, match="there are several columns 'a'; rename all but one"):
        from_table(double, label="y")
    wide = arrow.table({f"f{i}": [1] for i in range(12)})
    with pytest.raises(DataError, match=r"the columns are 'f0', .*'f9', \.\.\.$"):
        from_table(wide, label="outcome")
    assert from_table(wide, label="f0", features=["f1"]).shape == (1,)


def test_categories_without_a_value_are_refused() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"a": arrow.array([None], arrow.string()), "y": [0]})
    with pytest.raises(DataError, match="column 'a' holds no value at all; leave it out with"):
        from_table(table, label="y", missing="indicator")


def test_sources_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for source in (COLUMNS, X, None):
        with pytest.raises(DataError, match=r"from_table takes a data frame, .* not '\w+'$"):
            from_table(source, label="y")
    with pytest.raises(DataError, match=r"reads .csv and .parquet files, not 't.xlsx'; read it"):
        from_table(tmp_path / "t.xlsx", label="y")
    with pytest.raises(DataError, match=r"t: there is no file '.*t.csv'"):
        from_table(tmp_path / "t.csv", label="y")
    (tmp_path / "t.csv").write_text("a,y\n1,2\n3\n")
    with pytest.raises(DataError, match=r"t: 't.csv' cannot be read: .*Expected 2 columns, got 1"):
        from_table(tmp_path / "t.csv", label="y")
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"t: 't.parquet' cannot be read: "):
        from_table(str(tmp_path / "t.parquet"), label="y")


def test_frames_that_are_no_tables_are_refused() -> None:
    pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="not 'LazyFrame'; collect it first"):
        from_table(polars.DataFrame(COLUMNS).lazy(), label="outcome")
    with pytest.raises(DataError, match="this Series does not read as a table"):
        from_table(polars.Series([1, 2]), label="y")
    mixed = pandas.DataFrame({"a": [1, "x"], "y": [0, 1]})
    with pytest.raises(DataError, match=r"this DataFrame does not read as a table: .*column a"):
        from_table(mixed, label="y")


#: Texts that are one spelling only: see `plain`.
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=3
).filter(lambda text: plain(text) == text and text.casefold() not in MARKS)
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "real": st.floats(-1e6, 1e6, width=32),
    "whole": st.integers(-1000, 1000),
    "flag": st.booleans(),
    "text": TEXTS,
}


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of random kinds and one number of rows."""
    rows = draw(st.integers(1, 12))
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=6))
    return {
        f"{kind}{at}": draw(st.lists(CELLS[kind], min_size=rows, max_size=rows))
        for at, kind in enumerate(kinds)
    }


@pytest.mark.parametrize("make", [as_pandas, as_polars, as_arrow, as_duckdb, as_huggingface])
@settings(max_examples=40, deadline=None)
@given(columns=tables())
def test_any_table_is_encoded_as_scikit_learn_does(make: Maker, columns: dict[str, Any]) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    pytest.importorskip("pyarrow")
    blocks = []
    for name, values in columns.items():
        column = np.array(values, dtype=object)[:, None]
        if not name.startswith(("real", "whole")):
            column = preprocessing.OneHotEncoder(sparse_output=False).fit_transform(column)
        blocks.append(column.astype(np.float32))
    labels = [0] * len(next(iter(columns.values())))
    dataset = from_table(make({**columns, "label": labels}, Path()), label="label")
    np.testing.assert_array_equal(dataset.x, np.hstack(blocks))


@settings(max_examples=60, deadline=None)
@given(columns=tables(), data=st.data())
def test_any_test_part_is_encoded_as_scikit_learn_does(
    columns: dict[str, Any], data: st.DataObject
) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    arrow = pytest.importorskip("pyarrow")
    held_out = {
        name: data.draw(st.lists(CELLS[name[:-1]], min_size=3, max_size=3)) for name in columns
    }
    blocks = []
    for name, values in columns.items():
        column = np.array(held_out[name], dtype=object)[:, None]
        if not name.startswith(("real", "whole")):
            encoder = preprocessing.OneHotEncoder(sparse_output=False, handle_unknown="ignore")
            column = encoder.fit(np.array(values, dtype=object)[:, None]).transform(column)
        blocks.append(column.astype(np.float32))
    labels = [0] * len(next(iter(columns.values())))
    test = arrow.table({**held_out, "label": [0] * 3})
    dataset = from_table(arrow.table({**columns, "label": labels}), label="label", test=test)
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.test.x, np.hstack(blocks))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=12).filter(
        lambda values: any(value is not None for value in values)
    )
)
def test_missing_numbers_are_filled_as_scikit_learn_does(values: list[float | None]) -> None:
    impute = pytest.importorskip("sklearn.impute")
    arrow = pytest.importorskip("pyarrow")
    column = np.array(values, dtype=np.float64)[:, None]
    expected = impute.SimpleImputer(add_indicator=True).fit_transform(column)
    table = arrow.table({"a": arrow.array(values, arrow.float64()), "y": [0] * len(values)})
    dataset = from_table(table, label="y", missing="indicator")
    np.testing.assert_allclose(dataset.x, expected, rtol=1e-6, atol=1e-6)


# Hugging Face -------------------------------------------------------------------------------


def features_of(**kinds: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Features(kinds)


def pictures(count: int, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> list[Any]:
    """Random pictures that are stored without loss."""
    image = pytest.importorskip("PIL.Image")
    shape = (*size, 3) if mode == "RGB" else size
    pixels = np.random.default_rng(1).integers(0, 256, (count, *shape)).astype(np.uint8)
    return [image.fromarray(each) for each in pixels]


def test_tables_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    features = features_of(
        a=datasets.Value("float32"),
        colour=datasets.ClassLabel(names=["red", "green"]),
        grid=datasets.Array2D((2, 2), "int32"),
        site=datasets.ClassLabel(names=["west", "east"]),
        y=datasets.ClassLabel(names=["z", "b", "c"]),
    )
    grid = [[[1, 2], [3, 4]]] * 3
    columns = {"a": [1, 2, 3], "colour": [0, 1, 0], "grid": grid, "site": [1, 1, 0], "y": [1, 0, 1]}
    train = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict(train=train, test=train.select([2, 1]))
    dataset = from_huggingface(both, label="y", client="site", name="toy")
    assert dataset.class_names == ("z", "b", "c"), "in their own order"
    assert dataset.x.tolist() == [
        [1, 0, 1, 1, 2, 3, 4],
        [2, 1, 0, 1, 2, 3, 4],
        [3, 0, 1, 1, 2, 3, 4],
    ]
    assert dataset.keys["site"].tolist() == ["east", "east", "west"]
    assert dataset.test is not None
    assert dataset.test.x[:, 0].tolist() == [3, 2]
    assert dataset.test.y.tolist() == [1, 0]
    alone = from_huggingface(train, label="y", features="a")
    assert (alone.test, alone.shape, alone.name) == (None, (1,), "huggingface")
    given = from_huggingface(both, label="y", test=train, missing="indicator").test
    assert given is not None
    assert len(given) == 3
    number = from_huggingface(train, label="y", features=["a"], task="regression")
    assert (number.task.name, number.class_names) == ("regression", ())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_hugging_face(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("atoll.data.sources.huggingface._BATCH", 3)
    images = pictures(7, mode=mode)
    kinds = features_of(
        img=datasets.Image(),
        fine=datasets.ClassLabel(names=["u", "v"]),
        who=datasets.Value("string"),
    )
    columns = {"img": images, "fine": [0, 1, 0, 1, 0, 1, 1], "who": list("aabbccd")}
    train = datasets.Dataset.from_dict(columns, features=kinds)
    both = datasets.DatasetDict(train=train, test=train.select([6, 0]))
    dataset = from_huggingface(both, label="fine", client="who")
    pixels = np.stack([np.asarray(image) for image in images]).reshape(7, 5, 4, -1)
    expected = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(dataset.x, expected)
    assert dataset.y.tolist() == columns["fine"]
    assert dataset.class_names == ("u", "v")
    assert dataset.keys["who"].tolist() == columns["who"]
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.test.x, expected[[6, 0]])
    named = from_huggingface(train, label="who", features=["img"])
    assert named.class_names == ("a", "b", "c", "d")
    if mode == "RGB":
        pytest.importorskip("torch")
        same(
            from_torch(Pairs(*zip(images, columns["fine"], strict=True), classes=["u", "v"])),
            from_huggingface(train, label="fine"),
        )


def test_rows_of_hugging_face_are_never_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"img": pictures(9), "y": [0, 1, 2] * 3})
    train = train.cast_column("img", datasets.Image())
    asked: list[Any] = []
    original = datasets.Dataset.__getitem__

    def item(self: Any, key: Any) -> Any:
        asked.append(key)
        return original(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", item)
    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda self: pytest.fail("row by row"))
    from_huggingface(train, label="y")
    assert not [key for key in asked if isinstance(key, int)]


def test_hugging_face_refusals() -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict({"a": [1, 2], "y": [0, 1]})
    with pytest.raises(DataError, match="there is no split 'train' but 'test', 'validation'; give"):
        from_huggingface(datasets.DatasetDict(test=plain, validation=plain), label="y")
    for other in (plain.to_iterable_dataset(), {"train": plain}):
        with pytest.raises(DataError, match=r"takes a datasets\.Dataset or DatasetDict, not '"):
            from_huggingface(other, label="y")
        with pytest.raises(DataError, match=r"takes a datasets\.Dataset or DatasetDict, not '"):
            from_huggingface(plain, label="y", test=other)
    with pytest.raises(DataError, match="a streamed dataset has no length; load it with streaming"):
        from_table(plain.to_iterable_dataset(), label="y")
    with pytest.raises(
        DataError, match="takes one split of 'train', 'new'; from_huggingface takes"
    ):
        from_table(datasets.DatasetDict(train=plain, new=plain), label="y")
    with pytest.raises(DataError, match="there is no column 'Y'; close names are 'y'"):
        from_huggingface(plain, label="Y")
    with pytest.raises(DataError, match="huggingface, test part: there is no column 'a'"):
        from_huggingface(plain, label="y", test=plain.select_columns("y"))


def test_hugging_face_pictures_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    monkeypatch.setattr("atoll.data.sources.huggingface._BATCH", 2)

    def images(*columns: list[Any]) -> Any:
        named = {f"img{at}": column for at, column in enumerate(columns)}
        count = len(columns[0])
        kinds = features_of(**dict.fromkeys(named, image), y=datasets.Value("int64"))
        return datasets.Dataset.from_dict({**named, "y": [0] * count}, features=kinds)

    two = images(pictures(2), pictures(2))
    with pytest.raises(DataError, match="must be the only input, not one of 'img0', 'img1'; choo"):
        from_huggingface(two, label="y")
    with pytest.raises(DataError, match="must be the only input, not one of 'img0', 'y'"):
        from_huggingface(two, label="y", features=["img0", "y"])
    assert from_huggingface(two, label="y", features="img1").shape == (3, 5, 4)
    several = r"column 'img0' has pictures of several shapes, such as \("
    for odd in (
        pictures(1) + pictures(1, (6, 4)),
        pictures(2) + pictures(2, (6, 4)),
        pictures(1) + pictures(1, mode="L"),
    ):
        with pytest.raises(DataError, match=several):
            from_huggingface(images(odd), label="y")
    with pytest.raises(DataError, match="column 'img0' lacks pictures; drop these rows first"):
        from_huggingface(images([*pictures(1), None]), label="y")
    one = images(pictures(1))
    with pytest.raises(DataError, match="huggingface: there are no examples"):
        from_huggingface(one.select([]), label="y")
    with pytest.raises(DataError, match="huggingface, test part: there is no column 'img0'"):
        from_huggingface(one, label="y", test=one.select_columns("y"))


# Packages that are not there ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "read"),
    [
        ("pyarrow", lambda: from_table(SimpleNamespace(), label="y")),
        ("datasets", lambda: from_huggingface(None, label="y")),
        ("torch", lambda: from_torch(Pairs((X[0], 0)))),
        ("torchvision", lambda: from_torchvision("MNIST", "root")),
    ],
)
def test_a_package_that_is_not_there_is_named(
    package: str, read: Callable[[], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)

    class Absent:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingPackage, match=f"needs the package '{package}', which is not inst"):
        read()


def test_importing_the_sources_imports_no_library() -> None:
    code = (
        "import sys, atoll.data.sources; "
        "print([m for m in ('torch', 'sklearn', 'pandas', 'polars', 'pyarrow', 'duckdb', "
        "'datasets', 'torchvision', 'PIL') if m in sys.modules])"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
