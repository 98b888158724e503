"""Members: the sites that take part, what they say of themselves, and when they were heard of."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from atoll.rounds.roster import Resources, Roster
from atoll.rounds.schedules import Schedule
from atoll.service.storage.database import Store
from atoll.service.storage.tables import sites, tokens

logger = logging.getLogger("atoll.service")
#: So many of those who are waited for are named.
SHOWN = 5


@dataclass(frozen=True)
class Wait:
    """What is waited for, in words, and when that ends by itself, if it does."""

    what: str
    until: float | None = None


class Members:
    """A federation's sites, kept in memory and written down behind.

    `names` are those that have joined and were not revoked, in order; `seen` says when each was
    last heard of, `told` who knows that it is over.
    """

    def __init__(self, store: Store, clock: Callable[[], float], presence: float) -> None:
        self._store, self._clock, self._presence = store, clock, presence
        self.names: list[str] = []
        self.seen: dict[str, float] = {}
        #: When each was really heard of: `seen` is moved on where silence was our own.
        self.heard: dict[str, float] = {}
        self.told: set[str] = set()
        #: Sites whose check-in waits for news.
        self.parked: set[str] = set()
        #: Who has said goodbye, or was turned away.
        self.absent: set[str] = set()
        #: The agents that each site's check-ins came from, the latest last.
        self._agents: dict[str, list[str]] = {}
        self._said: dict[str, tuple[int, str]] = {}
        self._unsaid: set[str] = set()
        self._written: dict[str, float] = {}
        self._mark: object = None

    def saw(self, site: str, examples: int | None = None, about: str = "{}") -> None:
        """A site was heard of; what it says of itself is written down with the next tick."""
        self.seen[site] = self.heard[site] = self._clock()
        if site in self.absent:
            self.absent.discard(site)
            logger.info("%s is back", site)
        if examples is not None and self._said.get(site) != (examples, about):
            self._said[site] = examples, about
            self._unsaid.add(site)

    def doubled(self, site: str, agent: str | None) -> bool:
        """Whether this check-in shows that two agents are at work with one identity.

        One that was started again is another too, but the first is not heard of any more.
        """
        known = self._agents.setdefault(site, [])
        if agent is None or known[-1:] == [agent]:
            return False
        twice = agent in known
        # The last ones are enough; who was told of once is told of again only after others.
        self._agents[site] = [agent] if twice else [*known[-3:], agent]
        return twice

    def left(self, site: str) -> bool:
        """A site is not there any more, until it checks in again; whether that is news."""
        news = site not in self.absent
        self.absent.add(site)
        self.seen[site] = 0.0
        self.parked.discard(site)
        return news

    def refresh(self) -> None:
        """See which sites have joined or were revoked, also by other processes."""
        active = sa.case((sites.c.status == "active", 1), else_=0)
        mark = self._store.rows(
            sa.select(sa.func.count(), sa.func.max(sites.c.joined), sa.func.sum(active))
        )
        if mark == self._mark:
            return
        query = sa.select(sites.c.name, sites.c.examples, sites.c.about).where(
            sites.c.status == "active", sites.c.role == "site"
        )
        rows = self._store.rows(query)
        # Python's order, which no database's collation changes.
        names = sorted(row["name"] for row in rows)
        for name in sorted(set(self.names) - set(names)):
            logger.info("%s was revoked", name)
        self.names = names
        for row in rows:
            self._said.setdefault(row["name"], (row["examples"], row["about"]))
        self._mark = mark

    def roster(self, busy: Container[str]) -> Roster:
        """Everyone, of whom those can be invited who were heard of and are not busy."""
        now = self._clock()
        present = [
            member
            for member, name in enumerate(self.names)
            if name not in busy
            and (name in self.parked or now - self.seen.get(name, 0.0) <= self._presence)
        ]
        said = [self._said[name] for name in self.names]
        return Roster(
            tuple(self.names),
            np.array([examples for examples, _ in said], np.int64),
            np.array(present, np.int64),
            _resources([json.loads(about) for _, about in said]),
        )

    def wait(
        self, schedule: Schedule, roster: Roster, *, first: int | None, patient_until: float
    ) -> Wait | None:
        """Why nobody can be invited now.

        Before anything was asked, `first` sites must be there. Until `patient_until` everyone that
        would be asked is waited for.
        """
        if first is not None:
            # Heard of, not only enrolled: a cohort is drawn from those who are there, and is the
            # simulation's where everyone is.
            silent = [name for name in self.names if not self.seen.get(name)]
            have = len(self.names) - len(silent)
            if have < first:
                who = f"; missing: {_shown(silent)}" if silent else ""
                may, until = self._invited()
                if may:
                    who += f"; {_shown(may)} can still join"
                elif len(self.names) < first:
                    who += "; nobody else is invited"
                return Wait(f"the first round: {have} of {first} sites are there{who}", until)
        population, present = len(roster), len(roster.candidates())
        if population < schedule.least:
            return Wait(
                f"more sites: the schedule needs {schedule.least}, and {population} are part of "
                "this"
            )
        # Nobody waits for who has said that it leaves, unless it cannot be done without.
        there = population - len(self.absent.intersection(self.names))
        fewest = schedule.enough(population, patient=False)
        asked = max(fewest, min(schedule.enough(population, patient=True), there))
        patient = self._clock() < patient_until
        enough = asked if patient else fewest
        if present >= enough:
            return None
        silent = sorted(set(self.names) - {roster.names[member] for member in roster.candidates()})
        return Wait(
            f"{_shown(silent)} to be heard of: {present} of the {enough} that are needed were, "
            "lately",
            patient_until if patient and present >= fewest else None,
        )

    def invited(self) -> Wait | None:
        """The wait for those who were invited and may still join."""
        names, last = self._invited()
        return Wait(f"the first round: {_shown(names)} can still join", last) if names else None

    def _invited(self) -> tuple[list[str], float | None]:
        """Who may still join, and until when one of them may."""
        may = [tokens.c.used.is_(None), tokens.c.expires > self._clock(), tokens.c.role == "site"]
        some = sa.select(tokens.c.name).where(*may).order_by(tokens.c.name).limit(SHOWN + 1)
        last = sa.select(sa.func.max(tokens.c.expires).label("last")).where(*may)
        names = [row["name"] for row in self._store.rows(some)]
        return names, self._store.rows(last)[0]["last"]

    def write(self) -> None:
        """Write down what is new, all in one transaction."""
        new = {s: at for s, at in self.heard.items() if self._written.get(s) != at}
        if not new and not self._unsaid:
            return
        this = sites.c.name == sa.bindparam("site")
        with self._store.change() as change:
            # In order: two transactions must not wait for each other.
            change.many(
                sites.update().where(this).values(seen=sa.bindparam("at")),
                [{"site": site, "at": new[site]} for site in sorted(new)],
            )
            said = [(site, *self._said[site]) for site in sorted(self._unsaid)]
            change.many(
                sites.update()
                .where(this)
                .values(examples=sa.bindparam("count"), about=sa.bindparam("text")),
                [{"site": s, "count": count, "text": text} for s, count, text in said],
            )
        self._written |= new
        self._unsaid.clear()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _resources(said: Sequence[Mapping[str, str]]) -> Resources:
    """What members declare of their machines; what one does not declare it does not have."""
    return Resources(
        np.array([about.get("charging") == "yes" for about in said], bool),
        np.array([about.get("unmetered") == "yes" for about in said], bool),
        np.array([_speed(about.get("speed", "")) for about in said], np.float64),
    )


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        return math.nan
    return speed if math.isfinite(speed) and speed >= 0 else math.nan
