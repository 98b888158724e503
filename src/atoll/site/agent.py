"""The site agent: runs unattended beside the data, which never leave.

Its folder is its whole memory: key, what was approved, what the algorithm remembers, and updates
that are not yet delivered. It may be killed at any instant and started again.

key.pem          the site's private key
site.json        the server, the site's name
ca.pem           whom to trust
approved.json    what the owner has agreed to
secret.key       what nobody else may know: noise and masks are drawn from it
memory/          what is remembered from round to round, by the assignment that made it
kept/            what is kept of the questions of the round that is open
outbox/          an answer that is not yet delivered
model.safetensors  the federation's model, at the end
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll import __version__
from atoll.core import files, room, safetensors
from atoll.core.files import file_digest, own_folder
from atoll.core.model_file import save_model
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Tree, Vectors, nest
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, CheckpointError, NotAdmitted, RunError
from atoll.learners.base import Assignment
from atoll.protocol import messages
from atoll.protocol.identity import IdentityError, Token, make_key, read_identity, token_digest
from atoll.rounds.describe import about_model, agreed, differences, plan_digest, said
from atoll.rounds.evaluate import judged, own_model
from atoll.rounds.messages import pack
from atoll.rounds.plan import Plan
from atoll.rounds.task import (
    ClientTask,
    Received,
    answer_question,
    as_told,
    assignment_for,
    run_task,
)
from atoll.site.connection import Connection, Refusal, Stopped, find_authority
from atoll.site.memory import Memory
from atoll.site.terms import Terms

logger = logging.getLogger("atoll.site")
WAIT = 25.0
SHORTEST_BEAT = 0.5
FAILURES = 5
#: What an agent is busy with that measures a model, and owes nothing.
MEASURING = "measuring"
#: Seconds that a farewell may take.
FAREWELL = 5.0
#: What a server, or something before it, says of an update for good.
SETTLED = frozenset({403, 404, 410, 413, 422})


class Undelivered(AtollError):
    """An update that does not get through; the server was told."""


@dataclass(frozen=True)
class Ended:
    """How a site's work has ended: the federation's `outcome`, or "left" where the site was asked
    to leave before; after how many rounds; and the file of the model, if there is one."""

    outcome: str
    round: int
    model: Path | None = None


@dataclass
class Site:
    """One site at work in its folder.

    Args:
        folder: the agent's own folder.
        plan: the site's own copy of the federation.
        data: one client's data.
        terms: what is asked of the owner; None when everything is agreed to.
        declare: whether to say how many examples there are, and of what kind.
        resources: what else to say, e.g. {"charging": "yes", "unmetered": "yes", "speed": "12"}
            (local steps a second), for schedules that select by it.
        report: is told, in words, how it goes.
        leaving: set, from another thread, to leave at the next chance.
    """

    folder: Path
    plan: Plan
    data: FederatedData
    terms: Terms | None = None
    declare: bool = True
    resources: dict[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = logger.info
    leaving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        own_folder(self.folder, "site.json", "key.pem", "ca.pem", "outbox")
        (self.folder / "outbox").mkdir(exist_ok=True)
        self._memory = Memory(self.folder, self.plan)
        self._lock()
        self.plan.check_data(self.data)
        self._failures, self._agent = 0, secrets.token_hex(16)
        self._over = threading.Event()
        self._said_goodbye = False
        self._measures = True
        self._busy: str | None = None
        self._beat = SHORTEST_BEAT
        self._dropped = threading.Event()
        self._plan_digest = plan_digest(self.plan)
        self._secret = Key(int.from_bytes(_secret(self.folder / "secret.key"), "little"))

    def stop(self) -> None:
        """Ask the agent to leave at the next chance; what is unfinished stays in its folder."""
        self.leaving.set()

    @property
    def at_work(self) -> bool:
        """Whether it is training, or answering, for a round now."""
        return self._busy is not None

    def join(self, url: str, token: Token | None, system_authorities: bool = False) -> None:
        """Become a site of the federation, or take up being one."""
        key = make_key(self.folder / "key.pem")
        path = self.folder / "site.json"
        known = read_identity(self.folder) if path.exists() else None
        digest = token_digest(token.secret) if token else ""
        if known is not None and digest in ("", known.get("token")):
            authority, there = self.folder / "ca.pem", url or known["url"]
            if system_authorities:
                authority.unlink(missing_ok=True)
            elif token is not None and not authority.exists():
                # Back from --public-ca: the token still says whom to trust.
                pem = self._reaching(lambda: find_authority(there, token))
                files.write_atomically(authority, [pem])
            self.link = self._link(there, authority, key, known["site"])
            return
        if token is None:
            raise IdentityError("this site has not joined yet; give the token it was invited with")
        if system_authorities:
            (self.folder / "ca.pem").unlink(missing_ok=True)
        else:
            pem = self._reaching(lambda: find_authority(url, token))
            files.write_atomically(self.folder / "ca.pem", [pem])
        self.link = self._link(url, self.folder / "ca.pem", key, "")
        enrolled = self.link.enrol(token)
        if enrolled.role != "site":
            raise IdentityError(
                f"{enrolled.site} was invited as {enrolled.role}, which has no data to train on; "
                "see: atoll enrol"
            )
        files.write_json(
            path,
            {
                "url": self.link.url,
                "site": enrolled.site,
                "project": enrolled.project,
                "token": digest,
            },
        )
        self.report(f"joined {enrolled.project} as {enrolled.site}")

    def run(self) -> Ended:
        """Work until the federation is over or until `stop`; how it has ended."""
        beat = threading.Thread(target=self._heartbeat, daemon=True, name="atoll-heartbeat")
        try:
            self._ask_the_owner()
            beat.start()
            while not self.leaving.is_set():
                try:
                    self._send_outbox()
                except Undelivered:
                    continue
                order = self._next_order()
                if order.kind == "train":
                    try:
                        self._train(order)
                        self._failures = 0
                    except Undelivered:
                        continue
                    except (Stopped, Refusal, IdentityError, CheckpointError):
                        raise
                    except Exception as error:
                        # Whatever the model's code raises, the server is to know.
                        self._cannot(order, error)
                elif order.kind == "measure":
                    self._measure(order)
                elif order.kind == "stop":
                    return self._finish(order)
                else:
                    self._sleep(random.uniform(*order.wait))
        except Stopped:
            pass
        finally:
            self.leaving.set()
            self._over.set()
            self._farewell()
            self.link.close()
            if sys.platform != "win32":
                self._held.close()
        self.report("stopped; start again to go on")
        return Ended("left", 0)

    def _next_order(self) -> messages.Order:
        """What to do next; `Stopped` as soon as the agent is asked to leave.

        The question is asked in a thread of its own, because the answer may take its time.
        """
        found: queue.SimpleQueue[messages.Order | BaseException] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found.put(self.link.check_in(self._greeting(), WAIT))
            except BaseException as error:
                found.put(error)

        threading.Thread(target=ask, daemon=True, name="atoll-check-in").start()
        while True:
            if self.leaving.is_set():
                raise Stopped("the agent was asked to stop")
            with contextlib.suppress(queue.Empty):
                answer = found.get(timeout=0.1)
                if isinstance(answer, Refusal) and messages.PLAN in answer.detail:
                    self._other_copy(answer)
                if isinstance(answer, BaseException):
                    raise answer
                return answer

    def _other_copy(self, refusal: Refusal) -> None:
        """Raise with the settings that differ, if the server's plan can be read."""
        try:
            theirs = json.loads(refusal.detail[messages.PLAN])
            mine = json.loads(json.dumps(agreed(self.plan)))
            found = said(differences(mine, theirs), "here", "at the server")
        except (ValueError, RecursionError):
            return
        if found:
            raise NotAdmitted(
                "this site's copy of the federation is another than the server's: "
                f"{found[:1000]}. Bring the two files into one form"
            ) from refusal

    def _farewell(self, patience: float = 0.0) -> None:
        """Let the server know that nobody is to wait for this site: tried once, and briefly."""
        if self._said_goodbye:
            return
        # Another connection: a question may still be on its way on the first.
        link = self._link(self.link.url, self.folder / "ca.pem", self.link.key, self.link.site)
        link.patience = patience
        with contextlib.suppress(AtollError, OSError):
            link.check_in(self._greeting(farewell=True), 0, timeout=FAREWELL)
        link.close()

    def _train(self, order: messages.Order) -> None:
        """Receive, work, remember, and put the answer into the outbox."""
        assert order.assignment is not None
        started = time.perf_counter()
        waiting = self._outgoing(order.assignment, order.exchange, order.model)
        if waiting.exists():
            # What was made once is sent again, and never made anew.
            self._send_outbox()
            return
        try:
            tree, mail = self._received(order)
        except Refusal as refusal:
            if refusal.status not in (404, 410):
                raise
            self.report(f"round {order.round}: too late, its model is gone")
            return
        received = Received.of(self.plan, tree)
        task = ClientTask(
            0, self.link.site, self._assignment(order), self._memory.state(order, received),
            order.turn, mail=mail,
        )  # fmt: skip
        self._busy, self._beat = order.assignment, max(order.wait[0], SHORTEST_BEAT)
        self._dropped.clear()
        try:
            update, state = self._answer(order, received, task)
        finally:
            self._busy = None
        if self._dropped.is_set():
            self.report(f"round {order.round}: no longer needed")
            return
        # The memory first: an answer that is delivered must find it.
        self._memory.keep(order, task.state, state)
        files.write_atomically(waiting, pack(update))
        took = time.perf_counter() - started
        loss = update.metrics.get("train_loss")
        shown = "" if loss is None else f", loss {loss:.4g}"
        what = "trained" if order.works else f"answered {order.question!r}"
        self.report(f"round {order.round} of {order.rounds}: {what} in {took:.1f} s{shown}")
        self._send_outbox()

    def _measure(self, order: messages.Order) -> None:
        """Say how good the model that this site itself would use is on what it holds out."""
        examples, data = self.data.test(0), self.data
        figures: dict[str, float] = {}
        # What it is asked for next waits for it meanwhile: that it is at work is to be heard.
        self._busy, self._beat = order.assignment or MEASURING, max(order.wait[0], SHORTEST_BEAT)
        try:
            received = Received.of(self.plan, self._received(order)[0])
            state = self._memory.judged(order, received)
            task = judged(0, self.link.site, order.round, Key(order.seed), state)
            model = own_model(self.plan, received, task, data.train(0))
            learner = self.plan.learner
            sums = learner.evaluate(model, examples, data.task, data.classes)
            figures = learner.figures(sums, data.task)
        except Refusal as refusal:
            if refusal.status not in (404, 410):
                raise
            return  # the model has gone, and another one will come
        except (Stopped, IdentityError):
            raise
        except Exception as error:
            # It is said by having no figure; the round goes on without.
            logger.error("round %d cannot be measured here: %s", order.round, error)
        finally:
            self._busy = None
        told = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        try:
            self.link.measured(messages.Measured(order.round, len(examples), told))
        except Refusal as refusal:
            if refusal.status != 410:
                self._measures = False  # or it would be asked again at once, and for ever
            self.report(f"round {order.round}: what was measured was not taken: {refusal}")
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
        self.report(f"round {order.round} on {len(examples)} rows that are held out: {shown}")

    def _answer(
        self, order: messages.Order, received: Received, task: ClientTask
    ) -> tuple[Update, Tree]:
        """The answer to a question, and what is kept: for good, and under "kept" for the round."""
        examples = self.data.train(0)
        if order.works:
            return run_task(self.plan, received, task, examples)
        update, kept = answer_question(
            self.plan, received, order.question, order.owner, task, examples
        )
        return update, {"kept": kept} if kept else {}

    def _received(self, order: messages.Order) -> tuple[Tree, Vectors]:
        """What the order brings: the model, where it is needed, what is told, and our own mail."""
        tree: Tree = {}
        wanted = []
        if order.model is not None and (order.works or order.owner == "algorithm"):
            wanted.append(("model", order.model, order.size))
        if order.told is not None:
            wanted.append(("told", order.told, order.told_size))
        if order.mail is not None:
            wanted.append(("mail", order.mail, order.mail_size))
        found: dict[str, Vectors] = {}
        for kind, digest, size in wanted:
            path = self.folder / f"{kind}-{digest[:16]}"
            if not (path.exists() and file_digest(path) == digest):
                for old in self.folder.glob(f"{kind}-*"):
                    old.unlink(missing_ok=True)
                self.link.fetch(digest, size, path)
            found[kind] = _mapped(path)
        tree = {**as_told(found.get("model", {})), **nest(found.get("told", {}))}
        return tree, found.get("mail", {})

    def _assignment(self, order: messages.Order) -> Assignment:
        """The circumstances; what is drawn in secret depends on all that was received."""
        assert order.assignment is not None
        secret = self._secret.fold(
            "work", order.assignment, order.exchange, order.model or "", order.told or "",
            order.mail or "",
        )  # fmt: skip
        return assignment_for(
            Key(order.seed), self.link.site, order.round, order.turn, order.fraction, secret,
            order.exchange,
        )  # fmt: skip

    def _send_outbox(self) -> None:
        """Deliver what is waiting; an answer of any kind settles it."""
        for path in sorted((self.folder / "outbox").glob("*.safetensors")):
            name = path.name.removesuffix(".safetensors")
            assignment, exchange, model = (*name.split("-"), "0", "")[:3]
            try:
                verdict = self.link.upload(path, assignment, int(exchange), model or None)
                self.report(f"update {assignment} ({path.stat().st_size} bytes): {verdict.verdict}")
            except Refusal as refusal:
                # That the whole site was revoked is said at the next check-in.
                if refusal.status not in SETTLED:
                    raise
                self.report(f"update {assignment} was not taken: {refusal}")
                if not refusal.ours:
                    self._undelivered(path, assignment, refusal)
            path.unlink()

    def _undelivered(self, path: Path, assignment: str, refusal: Refusal) -> None:
        """Something in between does not let an update through: the server is to know why."""
        size = path.stat().st_size
        path.unlink()
        reason = f"its update of {size} bytes is refused on the way with status {refusal.status}"
        self._count_failure(assignment, reason)
        raise Undelivered(reason)

    def _cannot(self, order: messages.Order, error: Exception) -> None:
        """Training failed: say so to the server, and give up if it goes on like this."""
        assert order.assignment is not None
        logger.error("round %d cannot be trained here: %s", order.round, error)
        # What went wrong may show the data; the server learns only what kind it was.
        self._count_failure(order.assignment, f"training failed ({type(error).__name__})", error)

    def _count_failure(self, assignment: str, reason: str, error: Exception | None = None) -> None:
        """Tell the server, wait longer each time, and give up if it goes on like this."""
        with contextlib.suppress(Refusal):
            self.link.fail(assignment, reason)
        self._failures += 1
        if self._failures >= FAILURES:
            last = reason if error is None else f"training failed: {error}"
            raise RunError(
                f"{self._failures} rounds in a row came to nothing here, at last: {last}"
            ) from error
        if error is None:
            self._sleep(2.0**self._failures)

    def _finish(self, order: messages.Order) -> Ended:
        """Keep the federation's model, and say goodbye."""
        if order.round >= order.rounds:
            self._memory.counted(order)  # after a stop more may count than is known yet
        target = None
        if order.model is not None and order.round > 0:
            target = self.folder / "model.safetensors"
            fetched = self.folder / "model.part"
            self.link.fetch(order.model, order.size, fetched)
            about = about_model(self.plan, self.data)
            about |= {"round": order.round, "model": order.model}
            save_model(target, _mapped(fetched), self.plan.split.shared, about)
            fetched.unlink()
        self._farewell(patience=FAREWELL)
        self._said_goodbye = True
        self.report(f"{order.reason}: {order.round} of {order.rounds} rounds")
        return Ended(order.outcome or "done", order.round, target)

    def _greeting(self, *, busy: str | None = None, farewell: bool = False) -> messages.CheckIn:
        meaning = self.data.meaning
        return messages.CheckIn(
            plan=self._plan_digest,
            layout=self.plan.learner.layout.digest,
            examples=self.data.size(0) if self.declare else 0,
            held_out=len(self.data.test(0)) if self.declare and self._measures else 0,
            busy=busy,
            farewell=farewell,
            about={**self.resources, **(self._summary() if self.declare else {})},
            agent=self._agent,
            meaning=meaning.digest if meaning else None,
            inputs=_told(meaning.inputs) if self.declare else [],
            classes=_told(meaning.classes) if self.declare else [],
            target="".join(_told((meaning.target,))) if self.declare else "",
        )

    def _summary(self) -> dict[str, str]:
        shape = self.data.shape
        named = shape if isinstance(shape, dict) else {"": shape}
        sides = {name: " x ".join(map(str, each)) for name, each in named.items()}
        told = ", ".join(f"{name} {each}".strip() for name, each in sides.items())
        return {"atoll": __version__, "task": self.data.task.name, "inputs": told}

    def _heartbeat(self) -> None:
        """While a long training goes on, say that it does, and hear whether it still counts."""
        known = read_identity(self.folder)
        key = make_key(self.folder / "key.pem")
        link = self._link(self.link.url, self.folder / "ca.pem", key, known["site"])
        # Also when it was asked to leave: what it is at work on still counts.
        while not self._over.wait(self._beat):
            busy = self._busy
            if busy is None:
                continue
            with contextlib.suppress(AtollError, OSError):
                on = None if busy == MEASURING else busy
                order = link.check_in(self._greeting(busy=on), 0)
                if order.kind == "drop" and self._busy == busy:
                    self._dropped.set()

    def _ask_the_owner(self) -> None:
        """Wait until the owner has agreed to these terms."""
        if self.terms is None:
            return
        told, project = False, read_identity(self.folder).get("project", "")
        for _ in self.terms.offer(self.folder, project):
            if not told:
                self.report(
                    f"waiting for approval: see and decide with: atoll approve {self.folder}"
                )
                told = True
            self._sleep(0.5)

    def _outgoing(self, assignment: str, exchange: int, model: str | None) -> Path:
        name = f"{assignment}-{exchange}-{(model or '')[:32]}"
        return self.folder / "outbox" / f"{name}.safetensors"

    def _link(self, url: str, authority: Path, key: Any, site: str) -> Connection:
        pem = authority.read_bytes() if authority.exists() else None
        return Connection(url, pem, key, site, self._sleep, logger.info)

    def _reaching(self, attempt: Callable[[], bytes]) -> bytes:
        """The first contact, tried until the server answers."""
        import urllib3

        pause = 0.25
        while True:
            try:
                return attempt()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                logger.info("the server was not reached (%s); trying again", type(error).__name__)
                self._sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, 60.0)

    def _sleep(self, seconds: float) -> None:
        if self.leaving.wait(seconds):
            raise Stopped("the agent was asked to stop")

    def _lock(self) -> None:
        """One agent at a time in a folder."""
        if sys.platform == "win32":  # it has no such locks
            return
        import fcntl

        self._held = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{self.folder} is in use by another agent") from None


def _told(names: Sequence[str]) -> list[str]:
    """Names as a message may hold them: the first ones, short, in plain characters."""
    return [re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", name)[:80] for name in names[:256]]


def _mapped(path: Path) -> Vectors:
    """The arrays in a file, read where they are needed; what is written to them stays here."""
    return safetensors.decode(memoryview(room.opened(path, writable=True)))[0]


def _secret(path: Path) -> bytes:
    """A site's own key of 256 bits, made once."""
    if not path.exists():
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()
