"""The conductor: drives the coordinator with the real clock and makes what it decides durable.

Everything here happens on one event loop; only arithmetic and large files go to one other thread.
The order that loses nothing: bytes on disk, then the decision in a transaction, then the answer;
a model version on disk, then its transaction, then an invitation that names it. The sum of a round
is a cache: after a crash it is made again from the accepted updates, to the same bits.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from atoll.core.random import Key
from atoll.core.vectors import Vectors
from atoll.errors import CheckpointError
from atoll.rounds.buffered import coordinator_for
from atoll.rounds.coordinator import Answer, Phase, Verdict
from atoll.rounds.describe import describe, plan_digest
from atoll.rounds.messages import largest
from atoll.rounds.plan import Plan
from atoll.rounds.schedules import Buffered
from atoll.rounds.server import Server
from atoll.rounds.task import first_state
from atoll.service.deciding import Deciding
from atoll.service.members import Members
from atoll.service.opening import first_waits_for, next_waits_for
from atoll.service.settings import Service
from atoll.service.storage import rounds as ledger
from atoll.service.storage.blobs import Blobs
from atoll.service.storage.database import Change, Row, Store
from atoll.service.storage.models import ModelStore
from atoll.service.storage.tables import assignments, uploads, versions

logger = logging.getLogger("atoll.service")
#: Seconds between two ticks from which on they were not this process's to use.
SUSPENDED = 30.0
T = TypeVar("T")


class FederationLoop:
    """One federation, being run.

    Args:
        plan: what all parties agree on.
        service: how it is served.
        store, blobs: where it is kept.
        scratch: a folder on the blobs' disk for files in the making.
        evaluate: gives the metrics of a model after each round; None evaluates nothing.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        plan: Plan,
        service: Service,
        store: Store,
        blobs: Blobs,
        scratch: Path,
        *,
        evaluate: Callable[[Vectors], Mapping[str, float]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.plan, self.service, self.store = plan, service, store
        self.vault = ModelStore(plan, store, blobs, scratch)
        self.plan_digest, self.layout_digest = plan_digest(plan), plan.learner.layout.digest
        self.largest = largest(plan.schema)
        self.clock = clock
        self.changed = asyncio.Event()
        self.members = Members(store, clock, service.presence)
        self.stopping = False
        self.failed: BaseException | None = None
        self.server = Server(plan, Key(service.seed))
        self.coordinator = coordinator_for(plan.schedule, Key(service.seed))
        self.version: Row = {}
        self.open: dict[str, Row] = {}
        self._evaluate = evaluate
        self._thread = ThreadPoolExecutor(1, "atoll-sums")
        self._work: asyncio.Queue[Callable[[], None] | tuple[int, tuple[str, ...]]]
        self._worker: asyncio.Task[None] | None = None
        self._stepping = False
        self._patient_until = 0.0
        self._retry_at = 0.0
        self._faults = 0
        self._ticked = clock()
        #: What the next round waits for, in words.
        self.waiting = ""
        self._remembers = True

    async def start(self) -> None:
        """Take up where the store left off."""
        self._check_identity()
        latest = self.store.version()
        if latest is None:
            await self._first_version()
        else:
            self.version = latest
            await self._rest()
        self._remembers = bool(first_state(self.plan, self.server.broadcast()))
        state = self.store.setting("coordinator")
        if state is not None:
            self.coordinator.restore(state)
        self.members.refresh()
        now = self.clock()
        # Whoever has joined may come back after our own absence.
        self.members.seen = dict.fromkeys(self.members.names, now)
        self._patient_until = now + self.service.presence
        still = assignments.c.state == "open"
        self.open = {r["site"]: r for r in self.store.rows(sa.select(assignments).where(still))}
        self._work = asyncio.Queue()
        self.server.open()
        await self._refold()
        self._worker = asyncio.create_task(self._work_off(), name="atoll-sums")
        await self._in_thread(
            lambda: self.vault.tidy(self.version["version"], self.open, self.service.kept)
        )
        self._ticked = self.clock()

    async def close(self) -> None:
        """Finish what is in hand, and let go."""
        if self._worker is not None:
            await self._work.join()
            self._worker.cancel()
        self._thread.shutdown()
        self.members.write()

    @property
    def done(self) -> bool:
        """Whether there will be no more rounds."""
        return self.stopping or (
            self.coordinator.phase in (Phase.DONE, Phase.FAILED) and not self._busy
        )

    @property
    def _busy(self) -> bool:
        return self._stepping or self.version["version"] < self.coordinator.round - 1

    def memory_of(self, site: str) -> str | None:
        """The last assignment of a site whose update is in a model, so that its memory counts."""
        if not self._remembers:
            return None
        at_once = isinstance(self.plan.schedule, Buffered)
        version = None if at_once else self.version["version"]
        return ledger.last_counted(self.store, site, version)

    def offer(self, site: str, assignment: str, size: int, sha256: str) -> Row | Answer:
        """Open an upload, or say that none is needed; the same offer opens the same upload."""
        row = self.store.assignment(assignment)
        if row is None or row["site"] != site:
            return Answer(Verdict.UNKNOWN, f"{assignment!r} is not {site}'s assignment")
        if row["state"] == "accepted":
            return Answer(Verdict.DUPLICATE, f"the update of {site} was accepted before")
        if row["state"] != "open" or site not in self.open:
            reason = row["reason"] or f"assignment {assignment} is {row['state']}"
            return Answer(Verdict.NOT_NEEDED, reason)
        query = sa.select(uploads).where(uploads.c.assignment == assignment)
        found = self.store.rows(query)
        if found and (found[0]["size"], found[0]["digest"]) == (size, sha256):
            return found[0]
        values = {
            "id": secrets.token_hex(16), "assignment": assignment, "site": site, "size": size,
            "digest": sha256, "opened": self.clock(),
        }  # fmt: skip
        with self.store.change() as change:
            change.run(uploads.delete().where(uploads.c.assignment == assignment))
            change.run(uploads.insert().values(**values))
        for old in found:
            self.vault.part(old["id"]).unlink(missing_ok=True)
        return values

    async def deliver(self, upload: Row) -> Answer:
        """An upload is complete, on disk and of its declared digest: decide about the update."""
        path, site, id = self.vault.part(upload["id"]), upload["site"], upload["assignment"]
        fault = ledger.printable(await self._in_thread(lambda: self.vault.fault(path)))
        if not fault:
            # Durable before anyone decides; a blob that nobody names is swept away.
            await self._in_thread(lambda: self.vault.take(path, upload["digest"]))
        if self.store.upload(upload["id"]) is None:
            row = self.store.assignment(id)
            accepted = row is not None and row["state"] == "accepted"
            verdict = Verdict.DUPLICATE if accepted else Verdict.NOT_NEEDED
            return Answer(verdict, f"the update of {site} was decided upon before")
        now = self.clock()
        began = self.coordinator.round
        answer = self.coordinator.deliver(id, site, now, fault)
        with Deciding(self) as change:
            ledger.delivered(change, upload, answer, began, now)
            self._record_outcome(change, now)
        # It may be at work for a later round by now.
        if site in self.open and self.open[site]["id"] == id:
            del self.open[site]
        path.unlink(missing_ok=True)
        if answer.accepted:
            row = self.store.assignment(id)
            assert row is not None
            self._work.put_nowait(lambda: self.vault.fold(row, self.server.sums))
        self._after_outcome()
        self._count_faults(answer)
        return answer

    def _count_faults(self, answer: Answer) -> None:
        """An asynchronous run in which nothing but refused updates comes would go on for ever."""
        refused = answer.verdict is Verdict.MALFORMED
        self._faults = self._faults + 1 if refused else 0
        schedule = self.plan.schedule
        if isinstance(schedule, Buffered) and self._faults > schedule.most_faults:
            logger.error("%d updates in a row were refused: training diverges", self._faults)
            self.stop(f"the server, after {self._faults} refused updates in a row")

    def give_up(self, site: str, assignment: str, reason: str) -> bool:
        """A site says that it cannot deliver, or is given up; False if it owed nothing."""
        row = self.open.get(site)
        if row is None or row["id"] != assignment:
            return False
        now = self.clock()
        self.coordinator.lost(assignment, now)
        with Deciding(self) as change:
            ledger.lost(change, site, assignment, reason)
            self._record_outcome(change, now)
        del self.open[site]
        self._after_outcome()
        return True

    def tick(self) -> None:
        """What time alone brings about: leases, deadlines, the next round."""
        now = self.clock()
        if now - self._ticked > SUSPENDED:
            # This machine slept, or its clock was set: nobody else was silent for so long.
            self._pass_over(now - self._ticked)
        self._ticked = now
        self.members.refresh()
        self.members.write()
        if self.store.setting("stop") and not self.stopping:
            self.stop("the operator")
        active = set(self.members.names)
        for site, row in list(self.open.items()):
            if site not in active:
                self.give_up(site, row["id"], "the site was revoked")
                continue
            last = max(self.members.seen.get(site, 0.0), row["opened"])
            if now - last > self.service.lease:
                self.give_up(site, row["id"], f"not heard of for {now - last:.0f} s")
        if self.coordinator.deadline is not None and now >= self.coordinator.deadline:
            self.coordinator.tick(now)
            with Deciding(self) as change:
                self._record_outcome(change, now)
            self._after_outcome()
        self._invite(now)

    def stop(self, who: str) -> None:
        """No more rounds; sites are told to stop when they next ask."""
        with self.store.change() as change:
            change.set("stop", True)
            change.audit(who, "stop")
        self.stopping = True
        self.notify()

    def revoked(self, site: str) -> None:
        """A site is no longer part of this: what it owes is given up."""
        if site in self.open:
            self.give_up(site, self.open[site]["id"], "the site was revoked")
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for news."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _invite(self, now: float) -> None:
        """Open a round, or fill free places, when enough sites are there."""
        schedule = self.plan.schedule
        if self.stopping or self._busy or not self.coordinator.ready or now < self._retry_at:
            return
        first = self.coordinator.round == 1 and self.coordinator.phase is Phase.IDLE
        waiting = first_waits_for(schedule, self.service.sites, self.members) if first else ""
        if not waiting:
            roster = self.members.roster(self.open)
            waiting = next_waits_for(schedule, roster, patient=now < self._patient_until)
        self._say(waiting)
        if waiting:
            return
        attempt = self.coordinator.round, self.coordinator.attempt
        invitations = self.coordinator.open(roster, now)
        if not invitations and isinstance(schedule, Buffered):
            return
        with Deciding(self) as change:
            rows = ledger.opened(change, invitations, attempt, len(roster), now)
            change.audit(
                "server", "invited", round=attempt[0], sites=[row["site"] for row in rows],
                model=self.version["broadcast"],
            )  # fmt: skip
            self._record_outcome(change, now)
        self.open |= {row["site"]: row for row in rows}
        self._after_outcome()
        self.notify()

    def _say(self, text: str) -> None:
        """Log what is waited for, when it changes."""
        # Between two deliveries an asynchronous schedule has nobody to ask, as a rule.
        if text and text != self.waiting and not self.open:
            logger.info("waiting for %s", text)
        self.waiting = text

    def _pass_over(self, gap: float) -> None:
        """Do not hold a gap in this process's own time against anyone."""
        logger.warning("%.0f seconds passed unseen; leases and the deadline move by as much", gap)
        for site in self.members.seen:
            self.members.seen[site] += gap
        if self.coordinator.deadline is not None:
            self.coordinator.deadline += gap

    def _record_outcome(self, change: Change, now: float) -> None:
        """Keep the coordinator's state and, where an attempt has ended, how."""
        change.set("coordinator", self.coordinator.state())
        outcome = self.coordinator.outcome
        if outcome is not None:
            spare = not isinstance(self.plan.schedule, Buffered)
            ledger.ended(change, outcome, len(self.members.names), now, spare=spare)

    def _after_outcome(self) -> None:
        """Let the step follow, or another attempt."""
        outcome = self.coordinator.outcome
        if outcome is None:
            return
        self.coordinator.outcome = None
        if not isinstance(self.plan.schedule, Buffered):
            self.open = {
                s: r for s, r in self.open.items() if r["round"] > outcome.round
            }  # fmt: skip
        if outcome.closed:
            self._stepping = True
            self._work.put_nowait((outcome.round, outcome.accepted))
            return
        logger.warning("round %d was abandoned: %s", outcome.round, outcome.reason)
        self._retry_at = self.clock() + self.plan.schedule.pause
        self._work.put_nowait(self.server.open)
        if self.coordinator.phase is Phase.FAILED:
            logger.error("round %d was abandoned too often; there is no next try", outcome.round)
        self.notify()

    async def _work_off(self) -> None:
        """Sums and steps, one after the other."""
        while True:
            job = await self._work.get()
            try:
                if self.failed is not None:
                    continue  # a step must not follow a fold that was missed
                if isinstance(job, tuple):
                    await self._step(*job)
                else:
                    await self._in_thread(job)
            except Exception as error:
                logger.exception("the round's sum could not be made")
                self.failed = error
                self.notify()
            finally:
                self._work.task_done()

    async def _step(self, round: int, accepted: Sequence[str]) -> None:
        """Make the next version, keep it, and only then let it be known."""
        started = time.perf_counter()
        row = ledger.due(self.store, round)
        assert row is not None
        pulled = await self._pulled(accepted)
        measurements = await self._in_thread(
            lambda: self.vault.step(self.server, round, row["population"], pulled)
        )
        made = await self._in_thread(lambda: self.vault.keep(self.server))
        stepped = time.perf_counter()
        metrics = {}
        if self._evaluate is not None:
            evaluate, model = self._evaluate, self.server.model()
            metrics = dict(await self._in_thread(lambda: evaluate(model)))
        parts = [self.store.assignment(id) for id in accepted]
        if isinstance(self.plan.schedule, Buffered):
            ages = [part["staleness"] for part in parts if part]
            measurements |= {
                "staleness": sum(ages) / len(ages), "most_stale": float(max(ages)),
            }  # fmt: skip
        record = {
            "metrics": metrics,
            "measurements": measurements,
            "accepted": sorted(part["site"] for part in parts if part),
            "bytes_up": sum(part["size"] for part in parts if part),
            "broadcast": self.vault.size(self.version["broadcast"]),
            "phases": {"step": stepped - started, "evaluation": time.perf_counter() - stepped},
        }
        now = self.clock()
        with Deciding(self) as change:
            ledger.stepped(change, round, made, record, now)
        self.version = {"version": round, "made": now, **made}
        await self._rest()
        self.server.open()
        self._stepping = False
        shown = ", ".join(f"{n} {v:.4g}" for n, v in (metrics or measurements).items())
        logger.info("round %d closed with %d updates: %s", round, len(accepted), shown)
        names = self.vault.needed(round, self.open, self.service.kept)
        await self._in_thread(lambda: self.vault.sweep(names))
        self._invite(self.clock())
        self.notify()

    async def _pulled(self, accepted: Sequence[str]) -> tuple[float, Any] | None:
        schedule = self.plan.schedule
        if not (isinstance(schedule, Buffered) and schedule.pull):
            return None
        row = self.store.assignment(accepted[0])
        assert row is not None
        began = self.store.version(row["version"])
        assert began is not None
        vectors = await self._in_thread(lambda: self.vault.vectors(began["state"]))
        return schedule.staleness.discount(row["staleness"]), vectors["state/params"]

    async def _first_version(self) -> None:
        made = await self._in_thread(lambda: self.vault.keep(self.server))
        now = self.clock()
        with Deciding(self) as change:
            change.run(versions.insert().values(version=0, made=now, **made))
            change.audit("server", "federation begun", plan=self.plan_digest, **made)
        self.version = {"version": 0, "made": now, **made}
        await self._rest()

    async def _rest(self) -> None:
        """Between steps the model lies on disk: only the sum needs memory."""
        state = self.version["state"]
        self.server.restore(await self._in_thread(lambda: self.vault.vectors(state)))

    async def _refold(self) -> None:
        """After a restart: sum what was accepted, and take the steps that were due."""
        while True:
            round = self.version["version"] + 1
            rows = ledger.accepted_into(self.store, round)
            for row in rows:
                fold = partial(self.vault.fold, row, self.server.sums)
                await self._in_thread(fold)
            if ledger.due(self.store, round) is None:
                return
            await self._step(round, [row["id"] for row in rows])

    def _check_identity(self) -> None:
        """Keep what makes this federation itself, or see that it is the same one."""
        mine = {
            "plan": self.plan_digest, "seed": self.service.seed,
            "schedule": type(self.plan.schedule).__name__,
        }  # fmt: skip
        known = self.store.setting("identity")
        if known is not None and known != mine:
            raise CheckpointError(
                f"this state folder is of another federation: it was begun with {known}, and the "
                f"file now says {mine}; serve the file that it was begun with, or use a new folder"
            )
        if known is None:
            with self.store.change() as change:
                change.set("identity", mine)
        self.vault.blobs.claim(self.store.identify())
        with self.store.change() as change:
            change.set("plan", describe(self.plan))

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)
