"""eicu: intensive care at 186 hospitals, and who died in hospital.

Source: eICU Collaborative Research Database Demo 2.0.1, PhysioNet (Pollard et al. 2018), Open
Database License 1.0: attribute, and share alike. Read from the folder eicu-demo.

Preprocessing:

* One row per hospital admission, as the outcome belongs to the admission: its first intensive
  care stay that has APACHE variables. 2,205 stays have them; 26 of those whose hospital outcome
  is not recorded are left out, and later stays of the same admission as well: 2,073 rows.
  The 1,765 patients can still occur in several admissions, 18 of them in more than one hospital.
* The target is the hospital discharge status of the patient table: Expired is 1.
* Inputs are what APACHE knows after the first day. Columns that tell the outcome
  (`diedinhospital`, `dischargelocation`, every predicted and actual mortality and length of
  stay) are never read, nor are columns that are constant or repeat another.
* In the APACHE tables -1 means missing. A missing number becomes the centre of `_NUMBERS` and a
  flag says so. Scaled numbers are clipped to +-5: one urine output is 42 litres a day.
* The age "> 89", how the database hides great age, becomes 90.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.sets.columns import (
    Floats,
    Scale,
    flags,
    numbers,
    one_hot,
    padded,
    scaled_or_missing,
    side_by_side,
)
from atoll.data.sets.files import folder_file, read_columns
from atoll.data.tasks import CLASSIFICATION

Table = dict[str, list[str]]

_MISSING = ("", "-1")
_LIMIT = 5.0
_AGE: Scale = (62, 17)
#: The worst value of the first day: round constants near the middle of intensive care. The three
#: parts of the Glasgow coma scale are centred on their best, the value of an unscored patient.
_NUMBERS: dict[str, Scale] = {
    "eyes": (4, 1),
    "motor": (6, 1.5),
    "verbal": (5, 1.5),
    "urine": (1800, 1500),
    "wbc": (12, 7),
    "temperature": (36.5, 1),
    "respiratoryrate": (25, 15),
    "sodium": (138, 6),
    "heartrate": (100, 30),
    "meanbp": (85, 40),
    "ph": (7.37, 0.1),
    "hematocrit": (33, 7),
    "creatinine": (1.5, 1.6),
    "albumin": (2.9, 0.7),
    "pao2": (125, 80),
    "pco2": (42, 13),
    "bun": (26, 20),
    "glucose": (165, 100),
    "bilirubin": (1.3, 2.7),
    "fio2": (57, 26),
}
_TREATMENTS = ("intubated", "vent", "dialysis", "meds")
_CONDITIONS = (
    "thrombolytics",
    "hepaticfailure",
    "lymphoma",
    "metastaticcancer",
    "leukemia",
    "immunosuppression",
    "cirrhosis",
    "diabetes",
    "activetx",
    "readmit",
    "ima",
    "midur",
)
_CHOICES = {
    "gender": ("0", "1", "-1"),
    "electivesurgery": ("", "0", "1"),
    "admitsource": ("1", "2", "3", "4", "5", "6", "7", "8", "-1"),
}


def eicu() -> Dataset:
    """In-hospital death after admission to intensive care."""
    physiology = _table("apacheApsVar")
    stays = physiology["patientunitstayid"]
    predictors = _aligned(_table("apachePredVar"), stays)
    patients = _aligned(_table("patient"), stays)
    rows = _first_stays(patients)
    inputs = [scaled_or_missing(_ages(patients["age"]), _AGE, _LIMIT)]
    inputs += [
        scaled_or_missing(numbers(physiology[name], _MISSING), scale, _LIMIT)
        for name, scale in _NUMBERS.items()
    ]
    inputs += [flags(physiology[name], "1") for name in _TREATMENTS]
    inputs += [flags(predictors[name], "1") for name in _CONDITIONS]
    inputs += [one_hot(predictors[name], _CHOICES[name], f"eicu, {name}") for name in _CHOICES]
    died = flags(patients["hospitaldischargestatus"], "Expired")[:, 0]
    return Dataset(
        name="eicu",
        x=side_by_side(*inputs)[rows],
        y=died[rows],
        task=CLASSIFICATION,
        classes=2,
        keys={"hospital": padded(map(int, patients["hospitalid"]), 3)[rows]},
        class_names=("survived", "died"),
        describe="2,073 admissions to intensive care at 186 hospitals, and who died in hospital",
    )


def _table(name: str) -> Table:
    return read_columns(folder_file("eicu", f"eicu-demo/{name}.csv.gz"))


def _aligned(table: Table, stays: list[str]) -> Table:
    """The rows of these stays, in their order."""
    place = {stay: row for row, stay in enumerate(table["patientunitstayid"])}
    order = [place[stay] for stay in stays]
    return {name: [column[row] for row in order] for name, column in table.items()}


def _first_stays(patients: Table) -> NDArray[np.int64]:
    """The first stay of every admission whose outcome is recorded, in the order of the file."""
    first: dict[str, tuple[int, int]] = {}
    for row, admission in enumerate(patients["patienthealthsystemstayid"]):
        visit = (int(patients["unitvisitnumber"][row]), row)
        if patients["hospitaldischargestatus"][row]:
            first[admission] = min(visit, first.get(admission, visit))
    return np.array(sorted(row for _, row in first.values()), dtype=np.int64)


def _ages(column: list[str]) -> Floats:
    return numbers(["90" if text == "> 89" else text for text in column])
