"""Synthetic(alpha, beta): the heterogeneous logistic regression of FedProx.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, section 5.1 and
appendix C.1, with the settings of the authors' published generator: alpha and beta are used as
standard deviations, sizes are int(LogNormal(4, 2)) + 50, and one u_k centres both W_k and b_k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.data.dataset import Dataset
from atoll.data.federated import FederatedData, assemble
from atoll.data.tasks import CLASSIFICATION

DIMENSION, CLASSES = 60, 10


def synthetic(
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    clients: int = 30,
    iid: bool = False,
    largest: int | None = 5_000,
    test: float = 0.1,
    seed: int = 0,
) -> FederatedData:
    """A population whose models differ by `alpha` and whose inputs differ by `beta`.

    `iid` gives every client the same model and the same inputs. `largest` caps the log-normal
    sizes, whose tail can be hundreds of thousands; None leaves them as drawn.
    """
    rng = Key(seed).fold("synthetic", clients).generator()
    sizes = rng.lognormal(4, 2, clients).astype(np.int64) + 50
    if largest is not None:
        sizes = np.minimum(sizes, largest)
    model_centres = rng.normal(0, alpha, clients)
    input_centres = rng.normal(0, beta, clients)
    deviations = np.arange(1, DIMENSION + 1) ** -0.6  # the covariance is diag(j ** -1.2)
    shared = rng.normal(0, 1, (DIMENSION, CLASSES)), rng.normal(0, 1, CLASSES)
    x, y = [], []
    for client in range(clients):
        if iid:
            (weights, bias), mean = shared, np.zeros(DIMENSION)
        else:
            weights = rng.normal(model_centres[client], 1, (DIMENSION, CLASSES))
            bias = rng.normal(model_centres[client], 1, CLASSES)
            mean = rng.normal(input_centres[client], 1, DIMENSION)
        inputs = mean + deviations * rng.standard_normal((sizes[client], DIMENSION))
        x.append(inputs.astype(np.float32))
        y.append(_labels(inputs, weights, bias))
    name = "synthetic iid" if iid else f"synthetic({alpha:g}, {beta:g})"
    dataset = Dataset(name, np.concatenate(x), np.concatenate(y), CLASSIFICATION, CLASSES)
    partition = np.split(np.arange(len(dataset)), np.cumsum(sizes)[:-1])
    return assemble(dataset, [str(client) for client in range(clients)], partition, test, seed)


def _labels(
    x: NDArray[np.float64], weights: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.int64]:
    return np.asarray((x @ weights + bias).argmax(axis=1), dtype=np.int64)
