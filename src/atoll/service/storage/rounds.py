"""The ledger: a federation's decisions as rows, each written inside the caller's transaction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from atoll.rounds.coordinator import Answer, Invitation, Outcome, Verdict
from atoll.service.storage.database import Change, Row, Store
from atoll.service.storage.tables import assignments, rounds, uploads, versions

#: What an assignment is after a verdict; whatever else it was, it was no longer needed.
ENDS = {
    Verdict.ACCEPTED: "accepted",
    Verdict.MALFORMED: "refused",
    Verdict.STALE: "refused",
}


def opened(
    change: Change, invitations: Sequence[Invitation], attempt: tuple[int, int], population: int,
    now: float,
) -> list[Row]:  # fmt: skip
    """Members were invited to a round's attempt; their assignments."""
    round, number = attempt
    this = (rounds.c.round == round) & (rounds.c.attempt == number)
    if not change.run(rounds.update().where(this).values(population=population)):
        change.run(
            rounds.insert().values(
                round=round, attempt=number, state="open", opened=now, population=population
            )
        )
    rows: list[Row] = [
        {
            "id": each.id, "site": each.client, "round": each.round, "turn": each.turn,
            "fraction": each.fraction, "version": each.round - 1, "state": "open", "opened": now,
        }
        for each in invitations
    ]  # fmt: skip
    change.many(assignments.insert(), [dict(row) for row in rows])
    return rows


def delivered(change: Change, upload: Row, answer: Answer, round: int, now: float) -> None:
    """An update was decided upon; `round` is that whose mean it goes into, if it was accepted."""
    change.run(
        assignments.update()
        .where(assignments.c.id == upload["assignment"])
        .values(
            state=ENDS.get(answer.verdict, "spared"), delivered=now, digest=upload["digest"],
            size=upload["size"], staleness=answer.staleness, reason=answer.reason,
            counted=round if answer.accepted else None,
        )
    )  # fmt: skip
    change.run(uploads.delete().where(uploads.c.id == upload["id"]))
    change.audit(
        upload["site"], f"update {answer.verdict}", assignment=upload["assignment"],
        sha256=upload["digest"], size=upload["size"], reason=answer.reason,
    )  # fmt: skip


def lost(change: Change, site: str, assignment: str, reason: str) -> None:
    """A member will not deliver."""
    change.run(
        assignments.update()
        .where(assignments.c.id == assignment)
        .values(state="lost", reason=reason)
    )
    change.run(uploads.delete().where(uploads.c.assignment == assignment))
    change.audit(site, "lost", assignment=assignment, reason=reason)


def ended(change: Change, outcome: Outcome, population: int, now: float, *, spare: bool) -> None:
    """An attempt has ended; with `spare`, whoever is still at work for it is no longer needed."""
    this = (rounds.c.round == outcome.round) & (rounds.c.attempt == outcome.attempt)
    state = "stepping" if outcome.closed else "abandoned"
    new = {"state": state, "ended": now, "reason": outcome.reason}
    if not change.run(rounds.update().where(this).values(**new)):
        change.run(
            rounds.insert().values(
                round=outcome.round, attempt=outcome.attempt, opened=now, population=population,
                **new,
            )
        )  # fmt: skip
    if not spare:
        return
    mine = (assignments.c.round == outcome.round) & (
        assignments.c.id.like(f"{outcome.round}.{outcome.attempt}.%")
    )
    theirs = sa.select(assignments.c.id).where(mine)
    change.run(uploads.delete().where(uploads.c.assignment.in_(theirs)))
    change.run(
        assignments.update()
        .where(mine, assignments.c.state == "open")
        .values(state="spared", reason=f"round {outcome.round} is over")
    )
    if not outcome.closed:
        change.run(
            assignments.update()
            .where(mine, assignments.c.state == "accepted")
            .values(state="spared", counted=None, reason=outcome.reason)
        )
        change.audit("server", "round abandoned", round=outcome.round, reason=outcome.reason)


def stepped(
    change: Change, round: int, made: Mapping[str, str], record: Mapping[str, Any], now: float
) -> None:
    """A round has made its version."""
    change.run(versions.insert().values(version=round, made=now, **made))
    due = (rounds.c.round == round) & (rounds.c.state == "stepping")
    change.run(rounds.update().where(due).values(state="closed", ended=now, record=strict(record)))
    change.audit("server", "round closed", round=round, sites=record["accepted"], **made)


def due(store: Store, round: int) -> Row | None:
    """The attempt at a round that has closed and not yet made its version."""
    query = sa.select(rounds).where(rounds.c.round == round, rounds.c.state == "stepping")
    found = store.rows(query)
    return found[0] if found else None


def accepted_into(store: Store, round: int) -> Sequence[Row]:
    """The assignments whose updates go into a round's mean, in the order of their turns."""
    query = sa.select(assignments).where(assignments.c.counted == round)
    return store.rows(query.order_by(assignments.c.turn, assignments.c.id))


def last_counted(store: Store, site: str, version: int | None) -> str | None:
    """The latest assignment of a site whose update was accepted, and is in `version` if given."""
    query = (
        sa.select(assignments.c.id)
        .where(assignments.c.site == site, assignments.c.state == "accepted")
        .order_by(assignments.c.counted.desc(), assignments.c.turn.desc())
        .limit(1)
    )
    if version is not None:
        query = query.where(assignments.c.counted <= version)
    found = store.rows(query)
    return found[0]["id"] if found else None


def strict(value: Any) -> str:
    """Strict JSON, in which a figure that is not defined is null."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {name: plain(each) for name, each in item.items()}
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item

    return json.dumps(plain(value), separators=(",", ":"))


def printable(text: str) -> str:
    """What a stranger may have had a part in, fit for databases and terminals."""
    return "".join(c if c.isprintable() else "?" for c in text)[:500]
