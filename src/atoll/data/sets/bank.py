"""bank: telephone calls of a Portuguese bank, and who took out a deposit.

Source: Moro, Cortez & Rita 2014, UCI Machine Learning Repository, Bank Marketing (CC BY 4.0), all
45,211 rows of bank-full, from the folder bank-marketing. There is no official test part.

Preprocessing:

* `duration`, the length of the call, is left out: it is not known before the call, and once it
  is known so is the outcome. UCI says the same.
* Age and day of the month are scaled with round constants; balance becomes
  sign * log(1 + |euro|) / 10; counts of calls become log(1 + calls).
* `pdays` is -1 for people never called before: that is a flag of its own, and the days since the
  last call, in units of 100, are 0 for them.
* Categories are one-hot from fixed lists, "unknown" among them.
* Rows are in order of time (May 2008 to November 2010); nothing here makes use of that.
"""

from __future__ import annotations

import numpy as np

from atoll.data.dataset import Dataset
from atoll.data.sets.columns import Floats, flags, listed, numbers, one_hot, scaled, side_by_side
from atoll.data.sets.files import folder_file, read_columns
from atoll.data.tasks import CLASSIFICATION

_CATEGORIES = {
    "job": listed(
        "admin. blue-collar entrepreneur housemaid management retired self-employed services "
        "student technician unemployed unknown"
    ),
    "marital": listed("divorced married single"),
    "education": listed("primary secondary tertiary unknown"),
    "contact": listed("cellular telephone unknown"),
    "month": listed("jan feb mar apr may jun jul aug sep oct nov dec"),
    "poutcome": listed("failure other success unknown"),
}
_YES_OR_NO = ("default", "housing", "loan")


def bank() -> Dataset:
    """Who takes out a deposit when the bank calls."""
    table = read_columns(folder_file("bank", "bank-marketing/bank-full.csv.gz"))
    days = numbers(table["pdays"], missing=("-1",))
    return Dataset(
        name="bank",
        x=side_by_side(
            scaled(numbers(table["age"]), (41, 11)),
            scaled(numbers(table["day"]), (16, 8)),
            _signed_log(numbers(table["balance"])) / 10,
            _signed_log(numbers(table["campaign"])),
            _signed_log(numbers(table["previous"])),
            scaled(days, (0, 100)),
            np.isnan(days)[:, None],
            *(flags(table[name], "yes") for name in _YES_OR_NO),
            *(one_hot(table[name], known, f"bank, {name}") for name, known in _CATEGORIES.items()),
        ),
        y=flags(table["y"], "yes")[:, 0],
        task=CLASSIFICATION,
        classes=2,
        keys={"job": np.array(table["job"])},
        class_names=("no deposit", "deposit"),
        describe="45,211 telephone calls of a bank, and who took out a deposit",
    )


def _signed_log(values: Floats) -> Floats:
    return (np.sign(values) * np.log1p(np.abs(values)))[:, None]
