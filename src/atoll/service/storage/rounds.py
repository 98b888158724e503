"""The ledger: a federation's decisions as rows, each written inside the caller's transaction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from atoll.rounds.coordinator import Answer, Invitation, Outcome, Verdict
from atoll.service.storage.database import Change, Row, Store
from atoll.service.storage.tables import answers, assignments, rounds, uploads, versions

REFUSED = (Verdict.MALFORMED, Verdict.STALE)
#: What an assignment is after a verdict; whatever else it was, it was no longer needed.
ENDS = {Verdict.ACCEPTED: "accepted", **dict.fromkeys(REFUSED, "refused")}


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


def told(change: Change, step: int, sizes: Mapping[str, int]) -> None:
    """A question tells each of these assignments so many bytes; put twice, it counts once."""
    mine = (assignments.c.id == sa.bindparam("mine")) & (assignments.c.asked <= step)
    total = assignments.c.told + sa.bindparam("more")
    change.many(
        assignments.update().where(mine).values(told=total, asked=step + 1),
        [{"mine": id, "more": size} for id, size in sizes.items()],
    )


def delivered(
    change: Change, upload: Row, answer: Answer, round: int, now: float, *, works: bool
) -> None:
    """An answer was decided upon; `round` is that whose aggregate it goes into, if accepted.

    With `works` it is the update itself, and not the answer to a question beside it.
    """
    # What comes too late for a later question changes nothing about an update that was taken.
    still = (assignments.c.id == upload["assignment"]) & (assignments.c.state == "open")
    end = {"state": ENDS.get(answer.verdict, "spared"), "reason": answer.reason}
    if works:
        if answer.accepted:
            # Who works twice in a round is in the aggregate with what came last.
            mine, states = assignments.c.id == upload["assignment"], ("open", "accepted")
            still = mine & assignments.c.state.in_(states)
        change.run(
            assignments.update().where(still).values(
                **end, delivered=now, digest=upload["digest"], size=upload["size"],
                staleness=answer.staleness, counted=round if answer.accepted else None,
            )
        )  # fmt: skip
    elif not answer.accepted:
        change.run(assignments.update().where(still).values(**end))
    if answer.accepted:
        change.run(
            answers.insert().values(
                assignment=upload["assignment"], step=upload["step"], digest=upload["digest"],
                size=upload["size"],
            )
        )  # fmt: skip
    change.run(uploads.delete().where(uploads.c.id == upload["id"]))
    change.audit(
        upload["site"], f"{'update' if works else 'answer'} {answer.verdict}",
        assignment=upload["assignment"], sha256=upload["digest"], size=upload["size"],
        reason=answer.reason,
    )  # fmt: skip


def lost(change: Change, site: str, assignment: str, reason: str) -> None:
    """A member will not deliver."""
    # Whoever falls silent after its update was taken is still in the aggregate.
    change.run(
        assignments.update()
        .where(assignments.c.id == assignment, assignments.c.state != "accepted")
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
    if outcome.closed:
        # Who worked for an earlier question alone is not in the aggregate.
        left = (assignments.c.state == "accepted") & assignments.c.id.not_in(outcome.accepted)
        change.run(
            assignments.update()
            .where(mine, left)
            .values(state="spared", counted=None, reason="the round's last question was to others")
        )
    else:
        change.run(
            assignments.update()
            .where(mine, assignments.c.state == "accepted")
            .values(state="spared", counted=None, reason=outcome.reason)
        )
        change.audit("server", "round abandoned", round=outcome.round, reason=outcome.reason)


def stepped(
    change: Change,
    round: int,
    made: Mapping[str, str],
    record: Mapping[str, Any],
    accepted: Sequence[str],
    now: float,
) -> None:
    """A round has made its version."""
    change.run(versions.insert().values(version=round, made=now, **made))
    due = (rounds.c.round == round) & (rounds.c.state == "stepping")
    change.run(rounds.update().where(due).values(state="closed", ended=now, record=strict(record)))
    change.audit("server", "round closed", round=round, sites=sorted(accepted), **made)


def due(store: Store, round: int) -> Row | None:
    """The attempt at a round that has closed and not yet made its version."""
    query = sa.select(rounds).where(rounds.c.round == round, rounds.c.state == "stepping")
    found = store.rows(query)
    return found[0] if found else None


def attempted(store: Store, round: int, attempt: int) -> list[Row]:
    """The assignments of one attempt at a round, in the order of the roster."""
    mine = assignments.c.id.like(f"{round}.{attempt}.%")
    rows = store.rows(sa.select(assignments).where(assignments.c.round == round, mine))
    return sorted(rows, key=lambda row: int(row["id"].rpartition(".")[2]))


def answered(store: Store, ids: Sequence[str]) -> dict[int, dict[str, Row]]:
    """The answers that were accepted from these assignments, by question and assignment."""
    found: dict[int, dict[str, Row]] = {}
    for row in store.rows(sa.select(answers).where(answers.c.assignment.in_(list(ids)))):
        found.setdefault(row["step"], {})[row["assignment"]] = row
    return found


def population_of(store: Store, round: int, attempt: int) -> int:
    """How many sites there were when an attempt was opened."""
    this = (rounds.c.round == round) & (rounds.c.attempt == attempt)
    found = store.rows(sa.select(rounds.c.population).where(this))
    return int(found[0]["population"]) if found else 0


def was_answered(store: Store, assignment: str, step: int) -> bool:
    """Whether a question was answered before."""
    mine = (answers.c.assignment == assignment) & (answers.c.step == step)
    return bool(store.rows(sa.select(answers).where(mine)))


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
