"""The site agent: runs unattended beside the data, which never leave.

Its folder is its whole memory: key, what was approved, what the algorithm remembers, and updates
that are not yet delivered. It may be killed at any instant and started again.

key.pem          the site's private key
site.json        the server, the site's name
ca.pem           whom to trust
approved.json    what the owner has agreed to
memory/          what the algorithm remembers, by the assignment that made it
outbox/          an update that is not yet delivered
model.safetensors  the federation's model, at the end
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll import __version__
from atoll.core import files, safetensors
from atoll.core.files import file_digest
from atoll.core.random import Key
from atoll.core.vectors import Vectors
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, CheckpointError, ConfigurationError, RunError
from atoll.protocol import messages
from atoll.protocol.identity import IdentityError, Token, make_key, token_digest
from atoll.rounds.describe import describe, plan_digest
from atoll.rounds.messages import pack
from atoll.rounds.plan import Plan
from atoll.rounds.task import assignment_for, first_state, run_task
from atoll.site.connection import Connection, Refusal, Stopped, find_authority

logger = logging.getLogger("atoll.site")
WAIT = 25.0
SHORTEST_BEAT = 0.5
FAILURES = 5


@dataclass(frozen=True)
class Terms:
    """What a site's owner agrees to: the code, the plan, and what leaves the site."""

    code: str
    plan: str
    described: dict[str, Any]

    @staticmethod
    def of(plan: Plan, file: Path) -> Terms:
        """The terms of a federation as this site's own copy of the file says them."""
        parts = {
            name: describe(getattr(plan, name))
            for name in ("learner", "algorithm", "pipeline", "schedule")
        }
        return Terms(sha256(file.read_bytes()).hexdigest(), plan_digest(plan), parts)


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
    """

    folder: Path
    plan: Plan
    data: FederatedData
    terms: Terms | None = None
    declare: bool = True
    resources: dict[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = logger.info
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        for name in ("memory", "outbox"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._lock()
        self.plan.learner.check(self.data)
        self._busy: str | None = None
        self._beat = SHORTEST_BEAT
        self._dropped = threading.Event()
        self._plan_digest = plan_digest(self.plan)

    def stop(self) -> None:
        """Ask the agent to leave at the next chance; what is unfinished stays in its folder."""
        self._stop.set()

    def join(self, url: str, token: Token | None, system_authorities: bool = False) -> None:
        """Become a site of the federation, or take up being one."""
        key = make_key(self.folder / "key.pem")
        path = self.folder / "site.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        digest = token_digest(token.secret) if token else ""
        if known is not None and digest in ("", known.get("token")):
            authority = self.folder / "ca.pem"
            if system_authorities:
                authority.unlink(missing_ok=True)
            self.link = self._link(url or known["url"], authority, key, known["site"])
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

    def run(self) -> Path | None:
        """Work until the federation is over (the model's file is returned) or until `stop`."""
        self._approve()
        failures = 0
        beat = threading.Thread(target=self._heartbeat, daemon=True, name="atoll-heartbeat")
        beat.start()
        try:
            while not self._stop.is_set():
                self._send_outbox()
                order = self.link.check_in(self._greeting(), WAIT)
                if order.kind == "train":
                    try:
                        self._train(order)
                        failures = 0
                    except (Stopped, Refusal, IdentityError, CheckpointError):
                        raise
                    except Exception as error:
                        # Whatever the model's code raises, the server is to know.
                        failures += 1
                        self._cannot(order, error, failures)
                elif order.kind == "stop":
                    return self._finish(order)
                else:
                    self._sleep(random.uniform(*order.wait))
        except Stopped:
            pass
        finally:
            self._stop.set()
            self.link.close()
        self.report("stopped; start again to go on")
        return None

    def _train(self, order: messages.Order) -> None:
        """Receive, work, remember, and put the update into the outbox."""
        assert order.assignment is not None
        assert order.model is not None
        started = time.perf_counter()
        model = self.folder / f"model-{order.model[:16]}"
        if not (model.exists() and file_digest(model) == order.model):
            try:
                self.link.fetch(order.model, order.size, model)
            except Refusal as refusal:
                if refusal.status not in (404, 410):
                    raise
                self.report(f"round {order.round}: too late, its model is gone")
                return
        received, _ = safetensors.decode(memoryview(bytearray(model.read_bytes())))
        memory = self._remembered(order.memory, received)
        self._busy, self._beat = order.assignment, max(order.wait[0], SHORTEST_BEAT)
        self._dropped.clear()
        try:
            assignment = assignment_for(
                Key(order.seed), self.link.site, order.round, order.turn, order.fraction
            )
            update, kept = run_task(self.plan, received, memory, self.data.train(0), assignment)
        finally:
            self._busy = None
            for old in self.folder.glob("model-*"):
                if old != model:
                    old.unlink(missing_ok=True)
        if self._dropped.is_set():
            self.report(f"round {order.round}: no longer needed")
            return
        # The memory first: an update that is delivered must find it.
        files.save(self._memory(order.assignment), "memory", {}, kept)
        files.write_atomically(
            self.folder / "outbox" / f"{order.assignment}.safetensors", pack(update)
        )
        took = time.perf_counter() - started
        loss = update.metrics.get("train_loss")
        shown = "" if loss is None else f", loss {loss:.4g}"
        self.report(f"round {order.round} of {order.rounds}: trained in {took:.1f} s{shown}")
        self._send_outbox()

    def _send_outbox(self) -> None:
        """Deliver what is waiting; an answer of any kind settles it."""
        for path in sorted((self.folder / "outbox").glob("*.safetensors")):
            assignment = path.name.removesuffix(".safetensors")
            try:
                verdict = self.link.upload(path, assignment)
                self.report(f"update {assignment} ({path.stat().st_size} bytes): {verdict.verdict}")
            except Refusal as refusal:
                if refusal.status not in (403, 404, 410, 413, 422) or "revoked" in str(refusal):
                    raise
                self.report(f"update {assignment} was not taken: {refusal}")
            path.unlink()

    def _remembered(self, assignment: str | None, received: Vectors) -> Vectors:
        """What the algorithm remembers of the update that counted last; older files go."""
        path = None if assignment is None else self._memory(assignment)
        for other in (self.folder / "memory").glob("*.safetensors"):
            if other != path:
                other.unlink()
        blank = first_state(self.plan, received)
        if path is None or not blank:
            return blank
        if not path.exists():
            logger.warning(
                "the memory of update %s is lost; the algorithm begins anew here", assignment
            )
            return blank
        return files.load(path, "memory")[1]

    def _cannot(self, order: messages.Order, error: Exception, failures: int) -> None:
        """Training failed: say so to the server, and give up if it goes on like this."""
        assert order.assignment is not None
        logger.error("round %d cannot be trained here: %s", order.round, error)
        with contextlib.suppress(Refusal):
            # What went wrong may show the data; the server learns only what kind it was.
            self.link.fail(order.assignment, f"training failed ({type(error).__name__})")
        if failures >= FAILURES:
            raise RunError(
                f"training failed {failures} times in a row, at last: {error}"
            ) from error

    def _finish(self, order: messages.Order) -> Path | None:
        """Keep the federation's model, and say goodbye."""
        target = None
        if order.model is not None and order.round > 0:
            target = self.folder / "model.safetensors"
            self.link.fetch(order.model, order.size, target)
        with contextlib.suppress(Refusal, Stopped, OSError):
            self.link.check_in(self._greeting(farewell=True), 0)
        self.report(f"{order.reason}: {order.round} of {order.rounds} rounds")
        return target

    def _greeting(self, *, busy: str | None = None, farewell: bool = False) -> messages.CheckIn:
        return messages.CheckIn(
            plan=self._plan_digest,
            layout=self.plan.learner.layout.digest,
            examples=self.data.size(0) if self.declare else 0,
            busy=busy,
            farewell=farewell,
            about={**self.resources, **(self._summary() if self.declare else {})},
        )

    def _summary(self) -> dict[str, str]:
        shape = " x ".join(str(side) for side in self.data.shape)
        return {"atoll": __version__, "task": self.data.task, "inputs": shape}

    def _heartbeat(self) -> None:
        """While a long training goes on, say that it does, and hear whether it still counts."""
        known = json.loads((self.folder / "site.json").read_text(encoding="utf-8"))
        key = make_key(self.folder / "key.pem")
        link = self._link(self.link.url, self.folder / "ca.pem", key, known["site"])
        while not self._stop.wait(self._beat):
            busy = self._busy
            if busy is None:
                continue
            with contextlib.suppress(AtollError, OSError):
                order = link.check_in(self._greeting(busy=busy), 0)
                if order.kind == "drop" and self._busy == busy:
                    self._dropped.set()

    def _approve(self) -> None:
        """Wait until the owner has agreed to these terms."""
        if self.terms is None:
            return
        asked, agreed = self.folder / "terms.json", self.folder / "approved.json"
        plain = {"code": self.terms.code, "plan": self.terms.plan, **self.terms.described}
        files.write_json(asked, plain)
        told = False
        while not (agreed.exists() and json.loads(agreed.read_text("utf-8")) == plain):
            if not told:
                self.report(
                    f"waiting for approval: see and decide with: atoll approve {self.folder}"
                )
                told = True
            if (self.folder / "refused.json").exists():
                raise RunError("the owner of this site has refused the federation's terms")
            self._sleep(0.5)

    def _memory(self, assignment: str) -> Path:
        return self.folder / "memory" / f"{assignment}.safetensors"

    def _link(self, url: str, authority: Path, key: Any, site: str) -> Connection:
        pem = authority.read_bytes() if authority.exists() else None
        return Connection(url, pem, key, site, self._sleep, lambda text: logger.info("%s", text))

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
        if self._stop.wait(seconds):
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


def approve(folder: Path, *, refuse: bool = False) -> dict[str, Any]:
    """Agree (or not) to the terms that a waiting agent has been offered; returns them."""
    asked = folder / "terms.json"
    if not asked.exists():
        raise ConfigurationError(
            f"nothing waits for approval in {folder}; an agent that was started with --ask does"
        )
    terms: dict[str, Any] = json.loads(asked.read_text(encoding="utf-8"))
    name, other = ("refused", "approved") if refuse else ("approved", "refused")
    (folder / f"{other}.json").unlink(missing_ok=True)
    files.write_json(folder / f"{name}.json", terms)
    return terms
