"""cmapss: how long 100 jet engines will still run.

Source: Saxena & Goebel 2008, NASA C-MAPSS turbofan degradation simulation, FD001 (a work of the
United States Government, public domain), from the folder cmapss-fd001.

Preprocessing, the customary one of the literature on this set:

* Of 21 sensors, the seven that never or hardly change in FD001 and the three settings are left
  out; the other 14 are scaled with round constants near their middle (see `_SENSORS`).
* An input is the last 30 flights of an engine, [14, 30]; the first 29 flights of an engine have
  no window of their own. Neighbouring windows overlap, so hold out whole engines to test.
* The target is the number of flights left, capped at 125, because an engine far from its end
  shows no wear to count from. It is divided by 125: 1 means 125 flights or more.
* The test part is the last window of each of the 100 test engines with the official numbers,
  capped and divided in the same way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples
from atoll.data.sets.columns import Scale, padded, windows
from atoll.data.sets.files import folder_file, read_numbers
from atoll.data.tasks import REGRESSION

#: Flights left that the target 1 stands for; more are counted as this many.
CAP = 125
#: Flights in a window.
LENGTH = 30

#: Centre and spread by the sensor's number in the documentation.
_SENSORS: dict[int, Scale] = {
    2: (642.7, 0.5),
    3: (1590.5, 6.1),
    4: (1409, 9),
    7: (553.4, 0.9),
    8: (2388.1, 0.07),
    9: (9065, 22),
    11: (47.54, 0.27),
    12: (521.4, 0.74),
    13: (2388.1, 0.07),
    14: (8144, 19),
    15: (8.442, 0.0375),
    17: (393.2, 1.55),
    20: (38.82, 0.18),
    21: (23.29, 0.108),
}
#: In the files, sensor 1 follows the engine, the flight and three settings.
_BEFORE_SENSORS = 4


def cmapss() -> Dataset:
    """Remaining useful life of jet engines."""
    train, test = _engines("train_FD001"), _engines("test_FD001")
    remaining = _table("RUL_FD001")
    pieces = {engine: windows(flights, LENGTH, 1) for engine, flights in train.items()}
    # The last window of a training engine ends at its last flight, with none left.
    left = [np.arange(len(piece))[::-1] for piece in pieces.values()]
    owners = np.repeat(padded(pieces, 3), [len(piece) for piece in pieces.values()])
    return Dataset(
        name="cmapss",
        x=np.concatenate(list(pieces.values())),
        y=_share(np.concatenate(left)),
        task=REGRESSION,
        keys={"engine": owners},
        test=Examples(
            np.stack([flights[-LENGTH:].T for flights in test.values()]), _share(remaining[:, 0])
        ),
        describe="17,731 windows of 30 flights of 100 jet engines, and how many flights are left",
    )


def _engines(name: str) -> dict[int, NDArray[np.float32]]:
    """Scaled sensors [flights, 14] of every engine, in the order of the file."""
    table = _table(name)
    engines, first = np.unique(table[:, 0].astype(np.int64), return_index=True)
    columns = [number + _BEFORE_SENSORS for number in _SENSORS]
    centre, spread = np.array(list(_SENSORS.values())).T
    readings = ((table[:, columns] - centre) / spread).astype(np.float32)
    return dict(zip(engines.tolist(), np.split(readings, first[1:]), strict=True))


def _table(name: str) -> NDArray[np.float64]:
    return read_numbers(folder_file("cmapss", f"cmapss-fd001/{name}.txt.gz"))


def _share(left: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float32]:
    return (np.minimum(left, CAP) / CAP).astype(np.float32)
