"""The picture of a population: which client holds how much of what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atoll.view.figure import picture

if TYPE_CHECKING:
    from atoll.data.federated import FederatedData

SHOWN = 60


def draw_population(data: FederatedData, path: Path) -> Path:
    """Stacked bars of labels per client; sizes alone where there are no labels.

    Beyond 60 clients, 60 are shown, evenly spaced from the largest to the smallest.
    """
    sizes = data.sizes()
    order = np.argsort(-sizes, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int))]
    with picture(path, width=8, height=0.6 + 0.13 * max(len(chosen), 14)) as (_, axes):
        position = np.arange(len(chosen))
        if data.labelled and data.classes is not None:
            from matplotlib import colormaps

            colours = colormaps["tab20"].resampled(data.classes)
            left = np.zeros(len(chosen))
            for label, counts in enumerate(data.label_distribution()[chosen].T):
                name = data.class_names[label] if data.class_names else str(label)
                axes.barh(position, counts, left=left, color=colours(label), label=name, height=0.9)
                left += counts
            if data.classes <= 20:
                axes.legend(
                    title="label", loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small"
                )
        else:
            axes.barh(position, sizes[chosen], height=0.9)
        named = len(chosen) <= 30
        axes.set_yticks(position if named else [], [data.names[c] for c in chosen] if named else [])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("training examples")
        axes.set_ylabel("client" if named else f"{len(chosen)} of {len(data)} clients")
        axes.set_title(f"{data.name}: who holds what")
    return path
