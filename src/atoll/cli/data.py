"""`atoll data`."""

from __future__ import annotations

import argparse

import numpy as np

from atoll.cli.tables import print_table
from atoll.data import catalogue
from atoll.data.examples import columns_of, shape_text


def run(options: argparse.Namespace) -> int:
    """The sets there are, or what one of them holds."""
    if options.name:
        _show(options.name)
    else:
        rows = []
        for name in catalogue.names():
            entry = catalogue.get(name)
            missing = catalogue.available(name)
            rows.append((name, "yes" if missing is None else "no", entry.describe))
        print_table(("set", "here", "what it is"), rows)
        print("\n`atoll data NAME` loads one and shows what it holds, or says what it needs.")
    return 0


def _show(name: str) -> None:
    dataset = catalogue.load(name)
    print(catalogue.get(name).describe)
    task = dataset.task
    kind = f"{task}, {dataset.classes} {task.noun}" if dataset.classes else task.name
    dtypes = ", ".join(dict.fromkeys(str(column.dtype) for _, column in columns_of(dataset.x)))
    test = len(dataset.test) if dataset.test else 0
    rows = [
        ("task", kind),
        ("inputs", f"{dtypes} {shape_text(dataset.shape)}"),
        ("examples", f"{len(dataset)} and {test} for testing" if test else str(len(dataset))),
    ]
    if task.labelled and dataset.classes:
        counts = np.bincount(dataset.y, minlength=dataset.classes)
        names = dataset.class_names or tuple(str(label) for label in range(dataset.classes))
        shown = [f"{n} {c}" for n, c in zip(names, counts, strict=True)]
        rows.append(("labels", ", ".join(shown[:12]) + (" ..." if len(shown) > 12 else "")))
    for key in dataset.keys:
        clients = dataset.by(key)
        sizes = clients.sizes()
        rows.append(
            (
                f"clients by {key}",
                f"{len(clients)}, with {sizes.min()} to {sizes.max()} training examples "
                f"(median {np.median(sizes):g})",
            )
        )
    print_table(("", ""), rows, name)
