"""How good a model is at each site, on rows that the site holds out: who is asked, what they say.

A site is asked when it comes for its next work; nobody waits for it, and no round depends on it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from atoll.core import files
from atoll.protocol.messages import Measured
from atoll.rounds.plan import Plan
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import measured

logger = logging.getLogger("atoll.service")

#: What metrics are called, and what none is beyond.
NAME, LARGEST = re.compile(r"[A-Za-z][A-Za-z0-9_@.+-]{0,63}"), 1e9
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
        #: Which version each site was asked about, and how many rows it said that it holds out.
        self._asked: dict[str, tuple[int, int]] = {}
        self._version, self._settled = -1, set[str]()

    def wanted(self, site: str, version: int, *, done: bool) -> bool:
        """Whether a site is to measure this version now."""
        if self._every is None or version == 0 or (version % self._every and not done):
            return False
        if version != self._version:
            rows = self._store.rows(sa.select(measured).where(measured.c.round == version))
            self._version, self._settled = version, {row["site"] for row in rows}
        return site not in self._settled

    def ask(self, site: str, version: int, held_out: int) -> None:
        """A site is being asked."""
        self._asked[site] = (version, held_out)

    def told(self, site: str, message: Measured) -> str:
        """Keep what a site says that was asked, also if rounds went on meanwhile; or why not."""
        asked, held_out = self._asked.get(site, (0, 0))
        if not asked or message.round != asked:
            return f"nobody asks {site} how good the model of round {message.round} is"
        odd = [name for name in message.figures if not NAME.fullmatch(name)]
        if odd or any(abs(value) > LARGEST for value in message.figures.values()):
            return f"what {site} says are no figures of a model"
        del self._asked[site]
        figures = {name: value for name, value in message.figures.items() if math.isfinite(value)}
        with self._store.change() as change:
            change.run(
                measured.insert().values(
                    round=asked, site=site, examples=held_out,
                    figures=json.dumps(figures, sort_keys=True),
                )
            )  # fmt: skip
        if asked == self._version:
            self._settled.add(site)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items()))
        logger.info(
            "%s measured round %d on %d examples of its own: %s", site, asked, held_out,
            shown or "nothing that has a value",
        )  # fmt: skip
        self.write()
        return ""

    def write(self) -> None:
        """Write the latest figures into the run's folder."""
        if self._folder is not None:
            files.write_json(self._folder / SPREAD, by_metric(latest(self._store)))


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
