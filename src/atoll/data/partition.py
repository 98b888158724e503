"""Partitioners: which rows each client holds. One small function per idea.

Each takes a NumPy generator and returns one array of row numbers per client; together they
hold every row once. `Dataset` offers them as methods.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.numbers import positive, whole
from atoll.data.examples import Rows
from atoll.errors import DataError

Partition = list[Rows]
#: A smaller concentration is lost in rounding.
LEAST = 1e-12


def iid(examples: int, clients: int, rng: np.random.Generator) -> Partition:
    """Shuffle, then deal out evenly (McMahan et al., AISTATS 2017, section 3)."""
    _enough(examples, clients)
    return np.array_split(rng.permutation(examples), clients)


def dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, minimum: int, rng: np.random.Generator
) -> Partition:
    """Label skew: each class is split over the clients in proportions Dirichlet(alpha).

    Yurochkin et al., ICML 2019, section 4; "p_k ~ Dir(beta)" of Li et al., ICDE 2022. Small alpha
    leaves clients empty; those below `minimum` are topped up from the largest ones; an infinite one
    gives everybody the same share, which papers call IID.
    """
    _concentration(alpha)
    _enough(len(labels), clients, minimum)
    held: list[list[Rows]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = _shares(alpha, clients, rng)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for client, part in enumerate(np.split(rows, cuts)):
            held[client].append(part)
    partition = [rng.permutation(np.concatenate(parts)) for parts in held]
    return _top_up(partition, minimum)


def balanced_dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> Partition:
    """Label skew with equal sizes: each client draws from its own mixture of the classes.

    Hsu, Qi, Brown, 2019 (arXiv:1909.06335), section 3.1: q ~ Dirichlet(alpha * prior); a class
    that runs out is left out of the mixtures drawn after.
    """
    _concentration(alpha)
    _enough(len(labels), clients)
    present, counts = np.unique(labels, return_counts=True)
    pools = [list(rng.permutation(np.flatnonzero(labels == label))) for label in present]
    prior = counts / counts.sum()
    left = counts.astype(np.float64)
    partition = []
    for size in _even(len(labels), clients):
        mixture = prior if math.isinf(alpha) else _dirichlet(alpha * prior, rng)
        rows = []
        for _ in range(size):
            weights = np.where(left > 0, mixture, 0.0)
            if weights.sum() <= 0:
                weights = left
            pool = int(rng.choice(len(pools), p=weights / weights.sum()))
            rows.append(pools[pool].pop())
            left[pool] -= 1
        partition.append(np.array(rows, np.int64))
    return partition


def shards(
    labels: NDArray[np.int64], clients: int, per_client: int, rng: np.random.Generator
) -> Partition:
    """Sort by label, cut into clients * per_client shards, deal per_client shards to each.

    McMahan et al., AISTATS 2017, section 3: 200 shards of 300, and 2 shards for each client.
    """
    _enough(len(labels), clients, whole("per_client", per_client, 1, DataError))
    pieces = clients * per_client
    order = rng.permutation(len(labels))
    cut = np.array_split(order[np.argsort(labels[order], kind="stable")], pieces)
    dealt = rng.permutation(pieces).reshape(clients, per_client)
    return [rng.permutation(np.concatenate([cut[i] for i in hand])) for hand in dealt]


def sized(
    examples: int, weights: NDArray[np.float64], minimum: int, rng: np.random.Generator
) -> Partition:
    """Quantity skew: shuffled rows, client i holding about weights[i] / sum(weights) of them."""
    clients = len(weights)
    _enough(examples, clients, minimum)
    spare = examples - clients * minimum
    cuts = np.rint(np.cumsum(weights / weights.sum()) * spare).astype(np.int64)
    ends = cuts + minimum * np.arange(1, clients + 1)
    return np.split(rng.permutation(examples), ends[:-1])


def by_owner(owners: NDArray[Any]) -> tuple[list[str], Partition]:
    """One client per distinct owner, in sorted order, rows in their original order."""
    names, inverse = np.unique(owners.astype(str), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse, minlength=len(names)))
    return [str(name) for name in names], np.split(order, ends[:-1])


def _shares(alpha: float, clients: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if math.isinf(alpha):
        return np.full(clients, 1 / clients)
    return _dirichlet(np.full(clients, alpha), rng)


def _dirichlet(alpha: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A Dirichlet draw that stays a distribution when alpha is tiny (all gammas underflow)."""
    gammas = rng.gamma(alpha)
    total = gammas.sum()
    if total > 0:
        return np.asarray(gammas / total)
    chosen = np.zeros(len(alpha))
    chosen[rng.choice(len(alpha), p=alpha / alpha.sum())] = 1.0
    return chosen


def _top_up(partition: Partition, minimum: int) -> Partition:
    """Move rows from the largest clients to those that hold fewer than `minimum`."""
    sizes = np.array([len(rows) for rows in partition])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            donor = int(sizes.argmax())
            partition[client] = np.append(partition[client], partition[donor][-1])
            partition[donor] = partition[donor][:-1]
            sizes[client] += 1
            sizes[donor] -= 1
    return partition


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _enough(examples: int, clients: int, each: int = 1) -> None:
    whole("clients", clients, 1, DataError)
    needed = clients * max(1, whole("minimum", each, 0, DataError))
    if examples < needed:
        raise DataError(
            f"{examples} examples are too few: this partition needs at least {needed}; "
            "ask for fewer clients or a smaller minimum"
        )


def _concentration(alpha: float) -> None:
    if alpha != math.inf:
        positive("alpha", alpha, DataError)
        if alpha < LEAST:
            raise DataError(f"alpha must be {LEAST:g} or more, not {alpha!r}: below, draws are 0/0")
