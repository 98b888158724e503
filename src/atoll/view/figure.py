"""Drawing: one place that opens and saves figures, so that all of them look alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.errors import ConfigurationError, require

#: Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "figure.dpi": 120,
    "svg.hashsalt": "atoll",
    "svg.fonttype": "none",
}


@contextmanager
def picture(path: Path, width: float = 6.4, height: float = 4.0) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, written to `path` at the end (whole or not at all)."""
    require("matplotlib", "matplotlib", "drawing")
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "axes.prop_cycle": _cycle()}
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        try:
            figure.savefig(partial)
        except ValueError as error:
            raise ConfigurationError(f"{path} cannot be drawn: {error}") from error
        os.replace(partial, path)


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=COLOURS)
