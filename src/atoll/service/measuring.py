"""How good a model is at each site, on rows that the site holds out: who is asked, what they say.

A site is asked when it comes for its next work; nobody waits for it, and no round depends on it.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from atoll.core import files
from atoll.protocol.messages import Measured
from atoll.rounds.plan import Plan
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import measured

logger = logging.getLogger("atoll.service")

#: The file of a run's folder that has each site's figures.
SPREAD = "spread.json"


class Measuring:
    """The figures that sites tell of models.

    Args:
        plan: says after which rounds (`Evaluation.clients_every`).
        store: where they are kept.
        folder: the run folder, whose `spread.json` has the latest; None keeps none.
    """

    def __init__(self, plan: Plan, store: Store, folder: Path | None) -> None:
        self._every = plan.evaluation.clients_every
        self._store, self._folder = store, folder
        #: The sites that were asked or have answered, of the version that is asked about.
        self._version, self._settled = -1, set[str]()

    def wanted(self, site: str, version: int, *, done: bool) -> bool:
        """Whether a site is to measure this version now."""
        if self._every is None or version == 0 or (version % self._every and not done):
            return False
        self._at(version)
        return site not in self._settled

    def told(self, site: str, message: Measured, version: int) -> str:
        """Keep what a site that is wanted says of this version; why not, in words, if not."""
        if message.round != version:
            return f"round {message.round} is not measured now; the model is of round {version}"
        figures = {name: value for name, value in message.figures.items() if math.isfinite(value)}
        with self._store.change() as change:
            change.run(
                measured.insert().values(
                    round=version, site=site, examples=message.examples,
                    figures=json.dumps(figures, sort_keys=True),
                )
            )  # fmt: skip
        self._settled.add(site)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items()))
        logger.info(
            "%s measured round %d on %d examples of its own: %s", site, version, message.examples,
            shown or "nothing that has a value",
        )  # fmt: skip
        self.write()
        return ""

    def write(self) -> None:
        """Write the latest figures into the run's folder."""
        if self._folder is not None:
            files.write_json(self._folder / SPREAD, by_metric(latest(self._store)))

    def _at(self, version: int) -> None:
        if version != self._version:
            rows = self._store.rows(sa.select(measured).where(measured.c.round == version))
            self._version, self._settled = version, {row["site"] for row in rows}


def latest(store: Store) -> list[Row]:
    """What each site said last, by name."""
    newest = sa.select(measured.c.site, sa.func.max(measured.c.round).label("round"))
    newest_of = newest.group_by(measured.c.site).subquery()
    same = (measured.c.site == newest_of.c.site) & (measured.c.round == newest_of.c.round)
    query = sa.select(measured).join(newest_of, same).order_by(measured.c.site)
    return [{**row, "figures": json.loads(row["figures"])} for row in store.rows(query)]


def by_metric(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Each metric's value at each site, of the newest round that any of them has measured."""
    newest = max((row["round"] for row in rows), default=0)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["round"] == newest:
            for name, value in row["figures"].items():
                found.setdefault(name, {})[row["site"]] = value
    return found
