"""The loop of a served federation: brings the real clock and durability to the driver's rounds.

Everything here happens on one event loop; only arithmetic and large files go to one other thread.
The order that loses nothing: bytes on disk, then the decision in a transaction, then the answer;
a model version on disk, then its transaction, then an invitation that names it. The sum of a round
is a cache: after a crash it is made again from the accepted answers, to the same bits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa

from atoll.aggregation.conversation import Ask
from atoll.core.random import Key
from atoll.core.room import room_in
from atoll.core.vectors import Tree, Vector, Vectors
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, CannotClose, CheckpointError, ConfigurationError, RunError
from atoll.rounds.buffered import BufferedCoordinator
from atoll.rounds.coordinator import Answer, Coordinator, Phase, Verdict
from atoll.rounds.describe import agreed, describe, plan_digest
from atoll.rounds.driver import Driver
from atoll.rounds.evaluate import evaluate_pooled
from atoll.rounds.messages import largest
from atoll.rounds.plan import Plan
from atoll.rounds.server import Server
from atoll.rounds.stopping import check_rules, only, stop_reason
from atoll.rounds.task import Received, first_state
from atoll.service import meanings, operations
from atoll.service.deciding import Deciding
from atoll.service.history import History
from atoll.service.measuring import Measuring
from atoll.service.members import Members, Wait
from atoll.service.questions import Question, put_question
from atoll.service.replay import replay
from atoll.service.settings import Service
from atoll.service.storage import rounds as ledger
from atoll.service.storage.blobs import Blobs
from atoll.service.storage.database import Change, NotLeading, Row, Store
from atoll.service.storage.models import ModelStore
from atoll.service.storage.tables import uploads, versions

logger = logging.getLogger("atoll.service")
#: Seconds between two ticks from which on they were not this process's to use.
SUSPENDED = 30.0
#: So many seconds may a clock be set back as it is kept right.
SET_BACK = 2.0
#: Characters of a described plan that are told to a site whose copy is another.
DESCRIBED = 50_000
T = TypeVar("T")


class FederationLoop:
    """One federation, being run.

    Args:
        plan: what all parties agree on.
        service: how it is served.
        store, blobs: where it is kept.
        scratch: a folder on the blobs' disk for files in the making.
        test: data on whose test part each new model is measured.
        clock: seconds since the epoch.
        history: where the rounds are kept as a run that people look at; None keeps none.
        initial: the whole model to start from; None asks the learner.
    """

    def __init__(
        self,
        plan: Plan,
        service: Service,
        store: Store,
        blobs: Blobs,
        scratch: Path,
        *,
        test: FederatedData | None = None,
        clock: Callable[[], float] = time.time,
        history: Path | None = None,
        initial: Vectors | None = None,
    ) -> None:
        self.plan, self.service, self.store = plan, service, store
        self.models = ModelStore(plan, store, blobs, scratch)
        self.plan_digest, self.layout_digest = plan_digest(plan), plan.learner.layout.digest
        #: What sites must agree on, in JSON, to say where they differ.
        self.described = json.dumps(agreed(plan))[:DESCRIBED]
        self.clock = clock
        self.changed = asyncio.Event()
        self.members = Members(store, clock, service.presence)
        self.stopping = False
        #: Whether the plan's own rule has ended it, or that nothing but refused updates came.
        self.fulfilled = self.diverged = False
        self.failed: BaseException | None = None
        key, secret = Key(service.seed), Key(_secret_of(store))
        self.driver = Driver(plan, key, secret, initial)
        self.history = History(plan, service.seed, store, history)
        self.measuring = Measuring(plan, store, history)
        self.version: Row = {}
        self.open: dict[str, Row] = {}
        #: What the open question tells those who are asked; None under an asynchronous schedule.
        self.question: Question | None = None
        self.rows: dict[str, Row] = {}
        self._test = test
        self._thread = ThreadPoolExecutor(1, "atoll-sums")
        self._left = False
        self._work: asyncio.Queue[Callable[[], Any]]
        self._worker: asyncio.Task[None] | None = None
        self._stepping = self._folding = False
        #: Why what was accepted cannot be summed; the attempt is then abandoned.
        self._spoilt = ""
        self._patient_until = 0.0
        self._retry_at = 0.0
        self._faults = 0
        self._ticked = clock()
        #: What the next round waits for, in words.
        self.waiting = ""
        self._waits_until: float | None = None
        #: What of it is written down, for who looks at the folder.
        self._told_wait: object = None
        self._remembers = True
        self._told: dict[int, Tree] = {}

    @property
    def coordinator(self) -> Coordinator | BufferedCoordinator:
        """The state machine of the schedule."""
        return self.driver.coordinator

    @property
    def server(self) -> Server:
        """The model's state."""
        return self.driver.server

    async def start(self) -> None:
        """Take up where the store left off."""
        self._check_identity()
        if not self.models.has_room():
            # First of all: on a full disk nothing else may be possible.
            await self._in_thread(lambda: self.models.tidy(self.models.named()))
        latest = self.store.version()
        if latest is None:
            await self._first_version()
        else:
            self.version = latest
            await self._rest()
        state = self.store.setting("coordinator")
        if state is not None:
            self.coordinator.restore(state)
        received = Received.of(self.plan, self.server.broadcast(self.version["version"]))
        self._remembers = bool(first_state(self.plan, received, self.server.blank))
        self.members.refresh()
        self.history.begin(self.version["version"])
        self.measuring.write()
        self._work = asyncio.Queue()
        await self._refold()
        self._worker = asyncio.create_task(self._work_off(), name="atoll-sums")
        await self._work.join()  # what was due is done before anyone is answered
        names = self._needed()
        await self._in_thread(lambda: self.models.tidy(names))
        self._heed()
        self._ticked = now = self.clock()
        # Whoever has joined may come back after our own absence, which ends now.
        self.members.seen = dict.fromkeys(self.members.names, now)
        self._patient_until = now + self.service.presence

    async def close(self) -> None:
        """Finish what is in hand, and let go."""
        if self._worker is not None:
            await self._work.join()
            self._worker.cancel()
        self._left = True
        self._thread.shutdown()
        self.members.write()
        failed = self.coordinator.phase is Phase.FAILED
        self.history.close(failed=failed, models=self._made() if self.done else {})

    @property
    def done(self) -> bool:
        """Whether there will be no more rounds, and none is being closed."""
        if self.stopping:
            return not self._stepping
        return self.coordinator.phase in (Phase.DONE, Phase.FAILED) and not self._busy

    @property
    def outcome(self) -> Literal["done", "stopped", "given up"]:
        """How it has ended."""
        if self.coordinator.phase is Phase.FAILED or self.diverged:
            return "given up"
        return "stopped" if self.stopping and not self.fulfilled else "done"

    @property
    def _busy(self) -> bool:
        return self._stepping or self.version["version"] < self.coordinator.round - 1

    @property
    def largest(self) -> int:
        """Bytes that no honest answer to the open question exceeds."""
        works = not self.driver.open or self.driver.ask.works
        return largest(self.plan.stages.message if works else self.driver.ask.schema)

    def may_read(self, site: str, digest: str) -> bool:
        """Whether a blob belongs to the question that this site owes an answer to."""
        asked = self.question is not None and site in self.open
        return asked and self.question is not None and self.question.may_read(site, digest)

    def memory_of(self, site: str) -> str | None:
        """The last assignment of a site whose update is in a model, so that its memory counts."""
        if not self._remembers:
            return None
        version = self.version["version"] if self.plan.schedule.lockstep else None
        return ledger.last_counted(self.store, site, version)

    def offer(
        self,
        site: str,
        assignment: str,
        size: int,
        sha256: str,
        step: int,
        model: str | None = None,
    ) -> Row | Answer:
        """Open an upload, or say that none is needed; the same offer opens the same upload."""
        row = self.store.assignment(assignment)
        if row is None or row["site"] != site:
            return Answer(Verdict.UNKNOWN, f"{assignment!r} is not {site}'s assignment")
        began = self.store.version(row["version"])
        if model is not None and began is not None and not began["broadcast"].startswith(model):
            reason = f"the update of {site} was made from another model, before a restore"
            return Answer(Verdict.NOT_NEEDED, reason)
        if ledger.was_answered(self.store, assignment, step):
            return Answer(Verdict.DUPLICATE, f"the update of {site} was accepted before")
        owed = self.open.get(site)
        if owed is None or owed["id"] != assignment or step != self.coordinator.step:
            reason = row["reason"] or f"assignment {assignment} is {row['state']}"
            return Answer(Verdict.NOT_NEEDED, reason)
        query = sa.select(uploads).where(uploads.c.assignment == assignment)
        found = self.store.rows(query)
        known = (size, sha256, step)
        if found and (found[0]["size"], found[0]["digest"], found[0]["step"]) == known:
            return found[0]
        values = {
            "id": secrets.token_hex(16), "assignment": assignment, "site": site, "size": size,
            "digest": sha256, "opened": self.clock(), "step": step,
        }  # fmt: skip
        with self.store.change() as change:
            change.run(uploads.delete().where(uploads.c.assignment == assignment))
            change.run(uploads.insert().values(**values))
        for old in found:
            self.models.part(old["id"]).unlink(missing_ok=True)
        return values

    async def deliver(self, upload: Row) -> Answer:
        """An upload is complete, on disk and of its declared digest: decide about the answer."""
        path, site, id = self.models.part(upload["id"]), upload["site"], upload["assignment"]
        step, works = upload["step"], True
        fault = ""
        if step == self.coordinator.step and self.driver.open:
            ask, told = self.driver.ask, await self._told_of(id)
            works = ask.works
            fault = ledger.printable(
                await self._in_thread(lambda: self.models.fault(path, ask, told))
            )
        if not fault:
            # Durable before anyone decides; a blob that nobody names is swept away.
            await self._in_thread(lambda: self.models.take(path, upload["digest"]))
        if self.store.upload(upload["id"]) is None:
            accepted = ledger.was_answered(self.store, id, step)
            verdict = Verdict.DUPLICATE if accepted else Verdict.NOT_NEEDED
            return Answer(verdict, f"the update of {site} was decided upon before")
        if self.stopping and self.coordinator.outcome is not None:
            return Answer(Verdict.NOT_NEEDED, f"the federation was stopped before {site}'s update")
        now = self.clock()
        began = self.coordinator.round
        answer = self.coordinator.deliver(id, site, now, fault, step)
        with Deciding(self) as change:
            ledger.delivered(change, upload, answer, began, now, works=works)
            self._record_outcome(change, now)
        # It may be at work for a later round by now.
        if site in self.open and self.open[site]["id"] == id and step == self.coordinator.step:
            del self.open[site]
        path.unlink(missing_ok=True)
        if answer.accepted:
            self._work.put_nowait(partial(self._fold, id, upload["digest"]))
        elif answer.verdict in ledger.REFUSED:
            logger.warning(
                "the update of %s for round %d was refused: %s", site, began, answer.reason
            )
            self.history.note(id, f"{site}: {answer.reason}")
        self._after_outcome()
        self._count_faults(answer)
        return answer

    def _count_faults(self, answer: Answer) -> None:
        """An asynchronous run in which nothing but refused updates comes would go on for ever."""
        refused = answer.verdict is Verdict.MALFORMED
        self._faults = self._faults + 1 if refused else 0
        most = self.plan.schedule.most_faults
        if most is not None and self._faults > most:
            logger.error("%d updates in a row were refused: training diverges", self._faults)
            self.diverged = True
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
        self.history.note(assignment, f"{site}: {reason}")
        logger.info("%s does not deliver for round %d: %s", site, row["round"], reason)
        del self.open[site]
        self._after_outcome()
        return True

    def tick(self) -> None:
        """What time alone brings about: leases, deadlines, the next round."""
        now = self.clock()
        if not -SET_BACK < now - self._ticked < SUSPENDED:
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
            last = max(self.members.seen.get(site, 0.0), row.get("asked", row["opened"]))
            if now - last > self.service.lease:
                self.give_up(site, row["id"], f"not heard of for {now - last:.0f} s")
        if self.coordinator.deadline is not None and now >= self.coordinator.deadline:
            self.coordinator.tick(now)
            with Deciding(self) as change:
                self._record_outcome(change, now)
            self._after_outcome()
        self._invite(now)
        self._tell()

    def _tell(self) -> None:
        """Write down what is waited for, for who looks at the folder."""
        pause = self._retry_at if self.clock() < self._retry_at else None
        what, until = self.waiting, self._waits_until
        if self.open:
            what, until = "", self.coordinator.deadline
        elif pause is not None:
            what, until = "the pause after an abandoned round", pause
        told = {"for": what, "until": until, "silence": self.service.lease}
        if told != self._told_wait:
            with self.store.change() as change:
                change.set("waiting", told)
            self._told_wait = told

    def stop(self, who: str) -> None:
        """No more rounds; sites are told to stop when they next ask."""
        with self.store.change() as change:
            operations.stop(change, who)
        self.stopping = True
        self.notify()

    def left(self, site: str, reason: str) -> None:
        """A site will not answer until it comes again: nobody waits for what it owes."""
        if self.members.left(site):
            logger.warning("%s has left: %s", site, reason)
        if site in self.open:
            self.give_up(site, self.open[site]["id"], f"has left: {reason}")
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
        if self.stopping or self._busy or not self.coordinator.ready or now < self._retry_at:
            return
        if self.plan.schedule.lockstep and (self._folding or not self._work.empty()):
            return  # what is still to be summed is of an attempt that was abandoned
        attempt = self.coordinator.round, self.coordinator.attempt
        roster, schedule, wait = self.members.roster(self.open), self.plan.schedule, None
        wanted = None
        if attempt == (1, 0) and self.coordinator.phase is Phase.IDLE:
            wanted = schedule.wanted if self.service.sites is None else self.service.sites
            wait = self.members.invited() if wanted is None else None
        self._say(
            wait
            or self.members.wait(schedule, roster, first=wanted, patient_until=self._patient_until)
        )
        if self.waiting:
            if attempt == (1, 0):
                # Who has only just joined is still to check in.
                self._patient_until = now + self.service.presence
            return
        invitations = self.coordinator.open(roster, now)
        lockstep = self.plan.schedule.lockstep
        if not invitations and not lockstep:
            return
        with Deciding(self) as change:
            rows = ledger.opened(change, invitations, attempt, len(roster), now)
            change.audit(
                "server", "invited", round=attempt[0], sites=[row["site"] for row in rows],
                model=self.version["broadcast"],
            )  # fmt: skip
            self._record_outcome(change, now)
        if not lockstep:
            self.open |= {row["site"]: row for row in rows}
            self.rows |= {row["id"]: row for row in rows}
            self.notify()
            return
        self.rows = {row["id"]: row for row in rows}
        members = [(row["site"], row["turn"]) for row in rows]
        try:
            ask = self._begin(*attempt, members, len(roster))
        except CannotClose as error:
            self._abandon(str(error))
            return
        self._lockstep().need(ask.fewest, self._ids_of(ask.whom))
        if ask.told or ask.given or ask.mail:
            self._stepping = True
            self._work.put_nowait(self._asked)
        else:
            self._put(put_question(ask, self.models, 0))

    def _begin(
        self, round: int, attempt: int, members: Sequence[tuple[str, int]], population: int
    ) -> Ask:
        """Begin a round's conversation; raises `CannotClose` if it has nothing to ask."""
        self._spoilt = ""
        try:
            return self.driver.begin(round, members, population, attempt)
        except RunError as error:
            raise CannotClose(str(error)) from error

    def _abandon(self, reason: str) -> None:
        """Nothing can come of this attempt."""
        if self.coordinator.phase in (Phase.OPEN, Phase.HEARD):
            self._lockstep().abandon(ledger.printable(reason))
        with Deciding(self) as change:
            self._record_outcome(change, self.clock())
        self._stepping = False
        self._after_outcome()

    async def _asked(self) -> None:
        """A question is open: hand out what it tells, and have those who are asked know."""
        step = self.coordinator.step
        question = await self._in_thread(lambda: put_question(self.driver.ask, self.models, step))
        self._put(question)

    def _put(self, question: Question) -> None:
        # Its deadline may have passed while it was being put down.
        now, waiting = self.clock(), self.coordinator.phase is Phase.OPEN
        self.question = question if waiting else None
        with Deciding(self) as change:
            if self.plan.several:
                ledger.told(change, question.step, self._told_sizes(question))
            self._record_outcome(change, now)
        owed = self.coordinator.owed if waiting else ()
        self.open = {self.rows[id]["site"]: {**self.rows[id], "asked": now} for id in owed}
        self._stepping = False
        self._after_outcome()
        self.notify()

    def _told_sizes(self, question: Question) -> dict[str, int]:
        """How much a question tells each of those it goes to, by assignment."""
        size = self.models.size
        all_are_told = size(question.told) if question.told else 0
        if question.works or question.owner == "algorithm":
            all_are_told += size(self.version["broadcast"])
        mail = {id: question.mail.get(self.rows[id]["site"]) for id in self._lockstep().asked}
        return {id: all_are_told + (size(own) if own else 0) for id, own in mail.items()}

    def _ids_of(self, whom: Sequence[tuple[str, int]] | None) -> list[str]:
        """The assignments of those a question goes to."""
        if whom is None:
            return list(self.rows)
        chosen = set(whom)
        return [id for id, row in self.rows.items() if (row["site"], row["turn"]) in chosen]

    def _say(self, wait: Wait | None) -> None:
        """Log what is waited for, when it changes."""
        what = wait.what if wait else ""
        # Between two deliveries an asynchronous schedule has nobody to ask, as a rule.
        if what and what != self.waiting and not self.open:
            logger.info("waiting for %s", what)
        self.waiting, self._waits_until = what, wait.until if wait else None

    def _pass_over(self, gap: float) -> None:
        """Do not hold a gap in this process's own time against anyone."""
        what = "passed unseen" if gap > 0 else "were taken back by this machine's clock"
        logger.warning("%.0f seconds %s; leases and the deadline move by as much", abs(gap), what)
        for site in self.members.seen:
            self.members.seen[site] += gap
        for site, row in self.open.items():
            self.open[site] = {**row, "asked": row.get("asked", row["opened"]) + gap}
        self._patient_until += gap
        self._retry_at += gap
        if self.coordinator.deadline is not None:
            self.coordinator.deadline += gap

    def _record_outcome(self, change: Change, now: float) -> None:
        """Keep the coordinator's state and, where an attempt has ended, how."""
        change.set("coordinator", self.coordinator.state())
        outcome = self.coordinator.outcome
        if outcome is not None:
            population, spare = len(self.members.names), self.plan.schedule.lockstep
            ledger.ended(change, outcome, population, now, spare=spare)

    def _after_outcome(self) -> None:
        """Let the next question follow, the step, or another attempt."""
        if self.stopping:
            return  # sites are told of this version: what follows waits until it is served again
        if self.coordinator.phase is Phase.HEARD and not self._stepping:
            self._stepping = True
            self.open = {}
            self._work.put_nowait(self._hear)
            return
        outcome = self.coordinator.outcome
        if outcome is None:
            return
        self.coordinator.outcome = None
        if outcome.closed:
            self._stepping = True
            self._work.put_nowait(partial(self._step, outcome.round, outcome.accepted))
            return
        logger.warning("round %d was abandoned: %s", outcome.round, outcome.reason)
        self.history.note(str(outcome.round), f"abandoned: {outcome.reason}")
        self.open, self.question = {}, None
        self._retry_at = self.clock() + self.plan.schedule.pause
        if self.coordinator.phase is Phase.FAILED:
            logger.error("round %d was abandoned too often; there is no next try", outcome.round)
        self.notify()

    async def _work_off(self) -> None:
        """Sums, questions and steps, one after the other."""
        while True:
            job = await self._work.get()
            try:
                if self.failed is None:  # a step must not follow a fold that was missed
                    await job()
            except AtollError as error:
                logger.error("%s", error)
                self.failed = error
                self.notify()
            except Exception as error:
                logger.exception("the round's sum could not be made")
                self.failed = error
                self.notify()
            finally:
                self._work.task_done()

    async def _fold(self, id: str, digest: str) -> None:
        """Take an accepted answer into the sum."""
        row = self.store.assignment(id)
        assert row is not None
        told = await self._told_of(id)
        sender, age = (row["site"], row["turn"]), row["staleness"]
        self._folding = True
        try:
            await self._in_thread(lambda: self.models.fold(self.driver, digest, sender, told, age))
        except CannotClose as error:
            if not self.plan.schedule.lockstep:
                raise
            self._spoilt = str(error)
        finally:
            self._folding = False

    async def _hear(self) -> None:
        """The open question has enough answers: what follows is the rule's to say."""
        coordinator = self._lockstep()
        if self.driver.ask.works:
            coordinator.worked()
        senders = [(self.rows[id]["site"], self.rows[id]["turn"]) for id in coordinator.heard]
        try:
            if self._spoilt:
                raise CannotClose(self._spoilt)
            ask = await self._in_thread(lambda: self.driver.hear(senders))
        except RunError as error:
            self._abandon(str(error))
            return
        if ask is not None:
            heard = set(coordinator.heard)
            whom = [id for id in self._ids_of(ask.whom) if id in heard]
            coordinator.ask(ask.fewest, whom, self.clock())
            await self._asked()
            return
        coordinator.finish()
        now = self.clock()
        with Deciding(self) as change:
            self._record_outcome(change, now)
        self._stepping = False
        self._after_outcome()

    async def _step(self, round: int, accepted: Sequence[str]) -> None:
        """Make the next version, keep it, and only then let it be known."""
        started = time.perf_counter()
        row = ledger.due(self.store, round)
        assert row is not None
        parts = [part for part in map(self.store.assignment, accepted) if part is not None]
        if not self.plan.schedule.lockstep:
            await self._in_thread(
                lambda: self.driver.hear([(part["site"], part["turn"]) for part in parts])
            )
        origins = [(part["version"], part["staleness"]) for part in parts]
        digest = sha256("".join(f"{p['id']}{p['digest']}" for p in parts).encode()).hexdigest()
        began = self._began
        measurements = await self._in_thread(
            lambda: self.models.step(lambda: self.driver.step(round, origins, began, digest))
        )
        made = await self._in_thread(lambda: self.models.keep(self.server, round))
        stepped = time.perf_counter()
        metrics = {}
        if self._test is not None:
            test, model, learner = self._test, self.server.model(), self.plan.learner
            metrics = await self._in_thread(lambda: evaluate_pooled(learner, model, test))
        now = self.clock()
        size = self.models.size(self.version["broadcast"])
        phases = {"step": stepped - started, "evaluation": time.perf_counter() - stepped}
        record = self.history.made(round, metrics, measurements, size, now, phases)
        with Deciding(self) as change:
            ledger.stepped(change, round, made, record.json(), [p["site"] for p in parts], now)
        self.version = {"version": round, "made": now, **made}
        await self._rest()
        self.history.add(round)
        self._stepping, self.question = False, None
        if not self.plan.schedule.lockstep:
            self._begin_buffer()
        shown = ", ".join(f"{n} {v:.4g}" for n, v in (metrics or measurements).items())
        logger.info("round %d closed with %d updates: %s", round, len(accepted), shown)
        names = self._needed()
        await self._in_thread(lambda: self.models.sweep(names))
        self._told = {}
        self._heed()
        self._invite(self.clock())
        self.notify()

    def _began(self, version: int) -> Vector:
        """The parameters that clients of a version began from."""
        row = self.store.version(version)
        assert row is not None
        tree = self.models.read(row["broadcast"])
        params: Vector = Received.of(self.plan, tree).algorithm["params"]
        return params

    async def _told_of(self, id: str) -> Tree:
        """What the client of an assignment was told of the stages, when it began."""
        row = self.rows.get(id) or self.store.assignment(id)
        version = self.version["version"] if row is None else row["version"]
        if version == self.version["version"] or not self.server.stages:
            return self.plan.stages.broadcast(self.server.stages)
        if version not in self._told:
            known = self.store.version(version)
            assert known is not None
            digest = known["broadcast"]
            tree = await self._in_thread(lambda: self.models.read(digest))
            self._told[version] = tree.get("stages", {})
        return self._told[version]

    def _heed(self) -> None:
        """Stop where the plan says so."""
        first = self.history.records[:1]
        for record in first:
            names = {*record.metrics, *record.measurements}
            check_rules(self.plan.stop, names)
            best = self.plan.evaluation.best
            if best is not None and best not in names:
                raise ConfigurationError(
                    f"Evaluation(best={best!r}) is in no round: {only(names)}; serve with --test"
                )
        reason = stop_reason(self.plan.stop, self.history.records)
        if reason and not self.stopping:
            self.fulfilled = True
            self.stop(f"the plan: {reason}")

    def _needed(self) -> set[str]:
        """Digests of what may still be asked for."""
        newest, best = self.version["version"], self.history.best.record
        return self.models.needed(
            newest, self.open, self.service.kept, None if best is None else best.round
        )

    def _made(self) -> dict[str, Vectors]:
        """The final and the best model."""
        made, best = {"model": self.server.model()}, self.history.best.record
        row = None if best is None else self.store.version(best.round)
        if row is not None:
            made["best"] = self.models.vectors(row["model"])
        return {name: model for name, model in made.items() if model}

    async def _first_version(self) -> None:
        made = await self._in_thread(lambda: self.models.keep(self.server, 0))
        now = self.clock()
        with Deciding(self) as change:
            change.run(versions.insert().values(version=0, made=now, **made))
            change.audit("server", "federation begun", plan=self.plan_digest, **made)
        self.version = {"version": 0, "made": now, **made}
        await self._rest()

    async def _rest(self) -> None:
        """Between steps the model lies on disk: only the sum needs memory."""
        state = self.version["state"]
        self.server.restore(await self._in_thread(lambda: self.models.vectors(state)))

    def _begin_buffer(self) -> None:
        self.driver.begin(self.version["version"] + 1, (), len(self.members.names))

    async def _refold(self) -> None:
        """After a restart: sum what was accepted, ask what was asked, and step what was due."""
        if self.plan.schedule.lockstep:
            await replay(self)
            return
        while True:
            round = self.version["version"] + 1
            self._begin_buffer()
            rows = ledger.accepted_into(self.store, round)
            for row in rows:
                await self._fold(row["id"], row["digest"])
            if ledger.due(self.store, round) is None:
                break
            await self._step(round, [row["id"] for row in rows])
        owed = [self.store.assignment(id) for id in self.coordinator.owed]
        self.open = {row["site"]: row for row in owed if row is not None}

    def _lockstep(self) -> Coordinator:
        assert isinstance(self.coordinator, Coordinator)
        return self.coordinator

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
        self.models.blobs.claim(self.store.identify())
        with self.store.change() as change:
            change.set("plan", describe(self.plan))
            if self._test is not None:
                meanings.settle(change, self._test.meaning, "the server's test data")

    async def _in_thread(self, job: Callable[[], T]) -> T:
        if self._left:
            raise NotLeading("this server is leaving; ask again when it is back")

        def housed() -> T:
            with room_in(self.models.scratch):
                return job()

        return await asyncio.get_running_loop().run_in_executor(self._thread, housed)


def _secret_of(store: Store) -> int:
    """The server's own key, made once: what is drawn from it nobody else can know."""
    known = store.setting("secret")
    if known is None:
        known = str(secrets.randbits(256))
        with store.change(leading=False) as change:
            change.set("secret", known)
    return int(known)
