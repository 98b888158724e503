"""Replay: after a restart, a round's conversation is run again over the answers that were kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.errors import CannotClose, RunError
from atoll.rounds.coordinator import Coordinator, Phase
from atoll.service.storage import rounds as ledger

if TYPE_CHECKING:
    from atoll.service.loop import FederationLoop


async def replay(loop: FederationLoop) -> None:
    """Bring the driver to where the store says that the round stands, and go on from there."""
    coordinator = loop.coordinator
    assert isinstance(coordinator, Coordinator)
    due = ledger.due(loop.store, loop.version["version"] + 1)
    if due is not None:
        await _converse(loop, due["round"], due["attempt"], None)
        rows = ledger.accepted_into(loop.store, due["round"])
        await loop._step(due["round"], [row["id"] for row in rows])
        return
    if coordinator.phase not in (Phase.OPEN, Phase.HEARD):
        return
    try:
        await _converse(loop, coordinator.round, coordinator.attempt, coordinator.step)
    except CannotClose as error:
        loop._abandon(str(error))
        return
    loop._stepping = True
    if coordinator.phase is Phase.OPEN:
        if not coordinator.step:
            # The process may have ended before the first question was put.
            coordinator.need(loop.driver.ask.fewest, loop._ids_of(loop.driver.ask.whom))
        await loop._asked()
    else:
        await loop._hear()


async def _converse(loop: FederationLoop, round: int, attempt: int, step: int | None) -> None:
    """Run the conversation up to a question, or to its end where `step` is None."""
    rows = ledger.attempted(loop.store, round, attempt)
    loop.rows = {row["id"]: row for row in rows}
    kept = ledger.answered(loop.store, list(loop.rows))
    members = [(row["site"], row["turn"]) for row in rows]
    population = ledger.population_of(loop.store, round, attempt)
    loop._begin(round, attempt, members, population)
    place = 0
    while True:
        answers = kept.get(place, {})
        heard = [id for id in loop.rows if id in answers]
        for id in heard:
            await loop._fold(id, answers[id]["digest"])
        if loop._spoilt:
            raise CannotClose(loop._spoilt)
        if place == step:
            return
        senders = [(loop.rows[id]["site"], loop.rows[id]["turn"]) for id in heard]
        if await loop._in_thread(lambda s=senders: loop.driver.hear(s)) is None:  # type: ignore[misc]
            if step is not None:
                raise RunError("a round's conversation took another way than before the restart")
            return
        place += 1
