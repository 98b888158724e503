"""Movement worn on the wrist: wearables and hmp-wrist.

* wearables: 140 recordings of seven shoulder exercises by ten people wearing a smartwatch, 50
  samples a second of acceleration and angular velocity on three axes each (Burns et al. 2018,
  arXiv:1802.01489), as the package seglearn (BSD-3-Clause) ships them.
* hmp-wrist: UCI ADL Recognition with Wrist-worn Accelerometer (Bruno et al., CC BY 4.0), 839
  recordings of 14 activities by 16 volunteers, 32 samples a second of acceleration on three axes.

Preprocessing: every recording is cut into windows that overlap by half; a rest too short for a
window is dropped, and so is the one hmp-wrist recording that is shorter than a window. Because
neighbours overlap, rows of one person are not independent: hold out whole people to measure how
well a model does on new ones. Units are kept or divided by a constant: acceleration in g,
angular velocity in units of 2 radians per second; hmp-wrist stores 0 to 63 for -1.5 g to 1.5 g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.sets.columns import padded, windows
from atoll.data.sets.files import folder_file, package_path, read_arrays
from atoll.data.tasks import CLASSIFICATION

#: Samples in a window and from one window to the next: two seconds and one.
_WATCH_WINDOW = (100, 50)
#: Four seconds and two.
_WRIST_WINDOW = (128, 64)
_WATCH_UNITS = np.array([1, 1, 1, 2, 2, 2], dtype=np.float32)
_EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}


def wearables() -> Dataset:
    """Shoulder exercises of ten people."""
    file = package_path("wearables", "seglearn", "data/watch_dataset.npy", "seglearn")
    # The file is a pickle, so reading it runs what it says: it is trusted exactly as far as the
    # code of the installed package, which loads it the same way.
    watch: dict[str, Any] = np.load(file, allow_pickle=True).item()
    recordings = [np.asarray(series, dtype=np.float32) / _WATCH_UNITS for series in watch["X"]]
    x, source = _cut(recordings, *_WATCH_WINDOW)
    return Dataset(
        name="wearables",
        x=x,
        y=np.asarray(watch["y"])[source],
        task=CLASSIFICATION,
        classes=len(watch["y_labels"]),
        keys={"subject": padded(watch["subject"], 2)[source]},
        class_names=tuple(_EXERCISES.get(label, label) for label in watch["y_labels"]),
        describe="4,677 two-second windows of seven shoulder exercises by ten people",
    )


def hmp_wrist() -> Dataset:
    """Daily activities of 16 volunteers."""
    file = folder_file("hmp-wrist", "hmp-wrist/hmp_wrist.npz")
    names = ("activity_names", "volunteer_names")
    stored = read_arrays(file, "acc", "offset", "activity", "volunteer", *names)
    gravity = stored["acc"].astype(np.float32) * np.float32(3 / 63) - np.float32(1.5)
    x, source = _cut(np.split(gravity, stored["offset"][1:-1]), *_WRIST_WINDOW)
    return Dataset(
        name="hmp-wrist",
        x=x,
        y=stored["activity"][source],
        task=CLASSIFICATION,
        classes=len(stored["activity_names"]),
        keys={"volunteer": stored["volunteer_names"][stored["volunteer"][source]]},
        class_names=tuple(str(name).replace("_", " ") for name in stored["activity_names"]),
        describe="5,721 four-second windows of 14 daily activities by 16 volunteers",
    )


def _cut(
    recordings: Sequence[NDArray[np.float32]], length: int, step: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All windows of all recordings, and which recording each comes from."""
    pieces = [windows(series, length, step) for series in recordings]
    source = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return np.concatenate(pieces), source
