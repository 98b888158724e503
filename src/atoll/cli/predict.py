"""`atoll predict MODEL --federation FILE.py --data TABLE`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atoll.cli.encoding import pair
from atoll.cli.files import find_run, read_plan
from atoll.cli.tables import console, figure, print_table
from atoll.data.arrow import read_table
from atoll.data.examples import Examples
from atoll.data.tasks import task_of
from atoll.errors import ConfigurationError
from atoll.federation import saved_model
from atoll.learners.prediction import Predictions
from atoll.learners.saved import SavedModel

#: Rows that are printed where no file is to be written.
SHOWN = 10


def run(options: argparse.Namespace) -> int:
    """Encode a table as the model's sites did theirs, and say what the model says of its rows."""
    federation, path = read_plan(options.federation), Path(options.model)
    kept = saved_model(path if path.is_file() else find_run(options.model, options.runs))
    if "encoding" not in kept.about:
        raise ConfigurationError(
            f"{options.model} does not know how its inputs were encoded, so a table cannot be "
            "read for it; see Federation.predict for arrays"
        )
    saved = SavedModel.of(federation.learner, kept)
    encoding = saved.encoding
    assert encoding is not None
    name, units = Path(options.data).stem, dict(pair(text, "--unit") for text in options.unit)
    table = read_table(Path(options.data), name)
    x = encoding.inputs(table, name, units)
    found = saved.predict(x)
    targets = encoding.targets(table, name, units) if encoding.holds_label(table) else None
    rows = _rows(found)
    if options.output:
        with Path(options.output).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        print(f"written: {options.output} ({len(found)} rows)")
    else:
        _show(rows, len(found))
    if targets is not None:
        _score(saved, Examples(x, np.asarray(targets)))
    return 0


def _rows(found: Predictions) -> Iterator[list[str]]:
    """Headings and, for each row of the table, what the model says of it."""
    if found.probabilities is None or found.values.ndim > 1:
        width = 1 if found.values.ndim == 1 else found.values.shape[1]
        yield [
            "row",
            *(["prediction"] if width == 1 else [f"prediction {i}" for i in range(width)]),
        ]
        for row, value in enumerate(found.values.reshape(len(found), width).tolist()):
            yield [str(row), *(repr(each) for each in value)]
        return
    classes = found.names or tuple(map(str, range(found.probabilities.shape[1])))
    yield ["row", "prediction", *(f"probability of {name}" for name in classes)]
    for row, (label, shares) in enumerate(
        zip(found.labels, found.probabilities.tolist(), strict=True)
    ):
        yield [str(row), label, *(f"{share:.6g}" for share in shares)]


def _show(rows: Iterator[list[str]], count: int) -> None:
    head = next(rows)
    print_table(head, [row for row, _ in zip(rows, range(SHOWN), strict=False)])
    if count > SHOWN:
        console().print(f"and {count - SHOWN} more rows; --output FILE.csv writes them all")


def _score(saved: SavedModel, examples: Examples) -> None:
    """The table has the label too: say how good the predictions are."""
    kind = task_of(saved.task)
    sums = saved.learner.evaluate(saved.model, examples, kind, saved.classes)
    figures = saved.learner.figures(sums, kind)
    print_table(
        ("", ""), [(name.replace("_", " "), figure(value)) for name, value in figures.items()]
    )
