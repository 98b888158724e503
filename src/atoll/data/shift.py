"""Feature shift: the same task seen through different instruments, client by client."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.partition import Partition
from atoll.errors import DataError


def add_noise(
    x: NDArray[np.float32], partition: Partition, level: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Client i of N sees its features with Gaussian noise of variance level * (i + 1) / N.

    Li et al., "Federated learning on non-IID data silos", ICDE 2022, section 4.2.
    """
    shifted = x.copy()
    for client, rows in enumerate(partition):
        deviation = math.sqrt(level * (client + 1) / len(partition))
        noise = rng.standard_normal((len(rows), *x.shape[1:]), dtype=np.float32)
        shifted[rows] += np.float32(deviation) * noise
    return shifted


def rotate(x: NDArray[np.float32], partition: Partition, steps: int) -> NDArray[np.float32]:
    """Client i sees its images turned by (i mod steps) * 360 / steps degrees.

    With 4 steps these are the quarter turns of IFCA (Ghosh et al., NeurIPS 2020, section 6.1).
    Images are the last two axes; flat square images [N, side * side] are understood too.
    """
    images = _as_images(x)
    shifted = images.copy()
    for client, rows in enumerate(partition):
        turn = client % steps
        if (4 * turn) % steps == 0:
            shifted[rows] = np.rot90(images[rows], 4 * turn // steps, axes=(-2, -1))
        else:
            shifted[rows] = _turn(images[rows], 2 * math.pi * turn / steps)
    return shifted.reshape(x.shape)


def _as_images(x: NDArray[np.float32]) -> NDArray[np.float32]:
    if x.ndim == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
        side = math.isqrt(x.shape[1])
        return x.reshape(len(x), side, side)
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise DataError(f"only square images can be rotated, not inputs of shape {x.shape[1:]}")
    return x


def _turn(images: NDArray[np.float32], angle: float) -> NDArray[np.float32]:
    """Bilinear rotation about the centre; what comes from outside the image is zero."""
    side = images.shape[-1]
    centre = (side - 1) / 2
    row, column = np.mgrid[:side, :side] - centre
    source_row = math.cos(angle) * row + math.sin(angle) * column + centre
    source_column = -math.sin(angle) * row + math.cos(angle) * column + centre
    padded = np.pad(images, [(0, 0)] * (images.ndim - 2) + [(1, 2), (1, 2)])
    top, left = np.floor(source_row).astype(int), np.floor(source_column).astype(int)
    down, right = source_row - top, source_column - left
    turned: NDArray[Any] = np.zeros(images.shape, np.float64)
    for offset_row, weight_row in ((0, 1 - down), (1, down)):
        for offset_column, weight_column in ((0, 1 - right), (1, right)):
            rows = np.clip(top + offset_row + 1, 0, side + 2)
            columns = np.clip(left + offset_column + 1, 0, side + 2)
            turned += weight_row * weight_column * padded[..., rows, columns]
    return turned.astype(np.float32)
