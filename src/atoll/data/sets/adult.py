"""adult: the United States census of 1994, and who earned more than 50,000 dollars.

Source: Becker & Kohavi, UCI Machine Learning Repository (CC BY 4.0), the official 32,561 training
and 16,281 test rows, from the folder adult-census.

Preprocessing:

* `fnlwgt`, the weight of a row in the census sample, is no property of the person and is left
  out; `education` is left out because `education-num` says the same.
* Age, years of education and weekly hours are scaled with round constants; gains and losses of
  capital, nearly all zero with a long tail, become log(1 + dollars) / 10.
* Categories are one-hot from fixed lists; "?" is the category "unknown".
* The keys are the columns themselves, so a client holds one value of its own key column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples
from atoll.data.sets.columns import Scale, flags, listed, numbers, one_hot, scaled, side_by_side
from atoll.data.sets.files import folder_file, read_columns
from atoll.data.tasks import CLASSIFICATION

Table = dict[str, list[str]]

_NUMBERS: dict[str, Scale] = {
    "age": (38, 14),
    "education-num": (10, 2.5),
    "hours-per-week": (40, 12),
}
_DOLLARS = ("capital-gain", "capital-loss")
_CATEGORIES = {
    "workclass": listed(
        "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay "
        "Never-worked unknown"
    ),
    "marital-status": listed(
        "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent "
        "Married-AF-spouse"
    ),
    "occupation": listed(
        "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty "
        "Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing Transport-moving "
        "Priv-house-serv Protective-serv Armed-Forces unknown"
    ),
    "relationship": listed("Wife Own-child Husband Not-in-family Other-relative Unmarried"),
    "race": listed("White Asian-Pac-Islander Amer-Indian-Eskimo Other Black"),
    "sex": listed("Female Male"),
    "native-country": listed(
        "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) "
        "India Japan Greece South China Cuba Iran Honduras Philippines Italy Poland Jamaica "
        "Vietnam Mexico Portugal Ireland France Dominican-Republic Laos Ecuador Taiwan Haiti "
        "Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador "
        "Trinadad&Tobago Peru Hong Holand-Netherlands unknown"
    ),
}
_KEYS = {
    "occupation": "occupation",
    "race": "race",
    "sex": "sex",
    "country": "native-country",
}


def adult() -> Dataset:
    """Income above 50,000 dollars, from census answers."""
    train, test = _table("adult.data"), _table("adult.test")
    return Dataset(
        name="adult",
        x=_inputs(train),
        y=_targets(train),
        task=CLASSIFICATION,
        classes=2,
        keys={key: np.array(train[column]) for key, column in _KEYS.items()},
        test=Examples(_inputs(test), _targets(test)),
        class_names=("at most 50K", "more than 50K"),
        describe="32,561 answers to the census of 1994, and who earned more than 50,000 dollars",
    )


def _table(name: str) -> Table:
    table = read_columns(folder_file("adult", f"adult-census/{name}.csv.gz"))
    for column in _CATEGORIES:
        table[column] = ["unknown" if text == "?" else text for text in table[column]]
    return table


def _inputs(table: Table) -> NDArray[np.float32]:
    return side_by_side(
        *(scaled(numbers(table[name]), scale) for name, scale in _NUMBERS.items()),
        *(scaled(np.log1p(numbers(table[name])), (0, 10)) for name in _DOLLARS),
        *(one_hot(table[name], known, f"adult, {name}") for name, known in _CATEGORIES.items()),
    )


def _targets(table: Table) -> NDArray[np.float64]:
    # The test file ends every outcome with a full stop.
    return flags((outcome.rstrip(".") for outcome in table["outcome"]), ">50K")[:, 0]
