"""The application: HTTP in, decisions of the conductor out.

Who asks is settled before a body is read, and a body is never held whole: JSON is short, tensors go
to a file as they come. Every refusal has a status, a sentence and a count.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from atoll.errors import AtollError
from atoll.rounds.coordinator import Answer, Verdict
from atoll.service import messages
from atoll.service.blobs import DIGEST, BlobMissing
from atoll.service.bodies import (
    Refused,
    byte_range,
    file_digest,
    gathered,
    length,
    pieces,
    seconds,
    short_body,
    versions_named,
)
from atoll.service.conductor import Conductor
from atoll.service.identity import (
    ENROL,
    OPEN,
    Role,
    Session,
    Sessions,
    seal,
    token_digest,
    verified,
)
from atoll.service.measures import Measures
from atoll.service.openapi import description
from atoll.service.pace import Pace
from atoll.service.store import NotLeading, Row
from atoll.service.tables import rounds, sites, tokens

logger = logging.getLogger("atoll.service")

LONGEST_WAIT = 60.0
#: Long polls that are parked at the same time; others are told when to come again.
PARKED = 20_000
SHOWN = ("name", "role", "status", "joined", "examples")
STATUS = {
    Verdict.ACCEPTED: 200,
    Verdict.DUPLICATE: 200,
    Verdict.NOT_NEEDED: 410,
    Verdict.LATE: 410,
    Verdict.STALE: 410,
    Verdict.UNKNOWN: 404,
    Verdict.MALFORMED: 422,
}


class App:
    """The HTTP side of one server process.

    Args:
        conductor: what decides; None while another process leads.
        authority: the project's certificate (PEM), which anyone may have.
        project: the project's name.
        metrics_token: what `/metrics` asks for.
    """

    def __init__(self, authority: bytes, project: str, metrics_token: str) -> None:
        self.conductor: Conductor | None = None
        self.authority, self.project = authority, project
        self.metrics_token = metrics_token
        self.sessions = Sessions(time.monotonic)
        self.measures = Measures()
        self.pace = Pace()
        self.parked = 0
        self.closing = asyncio.Event()
        self._uploading: set[str] = set()

    def asgi(self) -> Starlette:
        """The ASGI application."""

        def route(path: str, endpoint: Callable[..., Awaitable[Response]], method: str) -> Route:
            return Route(path, self._counted(endpoint, path), methods=[method])

        return Starlette(
            routes=[
                route("/health", self.health, "GET"),
                route("/metrics", self.metrics, "GET"),
                route("/v1/openapi.json", self.openapi, "GET"),
                route("/v1/ca", self.ca, "GET"),
                route("/v1/enrol", self.enrol, "POST"),
                route("/v1/challenge", self.challenge, "POST"),
                route("/v1/session", self.session, "POST"),
                route("/v1/checkin", self.checkin, "POST"),
                route("/v1/blobs/{digest}", self.blob, "GET"),
                route("/v1/uploads", self.offer, "POST"),
                route("/v1/uploads/{upload}", self.offset, "HEAD"),
                route("/v1/uploads/{upload}", self.append, "PATCH"),
                route("/v1/assignments/{assignment}/fail", self.fail, "POST"),
                route("/v1/status", self.status, "GET"),
                route("/v1/rounds", self.rounds, "GET"),
                route("/v1/sites", self.sites, "GET"),
                route("/v1/sites/{site}/revoke", self.revoke, "POST"),
                route("/v1/stop", self.stop, "POST"),
            ],
            exception_handlers={HTTPException: _problem, Exception: _broken},
        )

    async def health(self, request: Request) -> Response:
        leads = self.conductor is not None
        return JSONResponse(
            {"status": "ok" if leads else "standby", "project": self.project},
            200 if leads else 503,
        )

    async def metrics(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.metrics_token.encode()):
            raise Refused(
                401, "give the token in the state folder's file metrics.token as a bearer token"
            )
        return Response(
            self.measures.exposition(self.conductor, len(self.sessions), self.parked),
            media_type="text/plain; version=0.0.4",
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description())

    async def ca(self, request: Request) -> Response:
        return Response(self.authority, media_type="application/x-pem-file")

    async def enrol(self, request: Request) -> Response:
        message = messages.read(messages.Enrol, await short_body(request))
        conductor, digest = self._leading(), token_digest(message.secret)
        now = conductor.clock()
        if not verified(message.key, message.signature, ENROL + bytes.fromhex(message.secret)):
            raise Refused(401, "the signature is not the key's", audited="enrolment")
        with conductor.store.change() as change:
            taken = change.run(
                tokens.update()
                .where(tokens.c.digest == digest, tokens.c.used.is_(None), tokens.c.expires > now)
                .values(used=now)
            )
            row = (
                change.connection.execute(sa.select(tokens).where(tokens.c.digest == digest))
                .mappings()
                .first()
            )
            if not taken and row is not None and row["used"] is not None:
                known = (
                    change.connection.execute(sa.select(sites).where(sites.c.name == row["name"]))
                    .mappings()
                    .first()
                )
                if known is not None and known["key"] == message.key:
                    # The same site, whose answer was lost on its way.
                    return _json(messages.Enrolled(row["name"], row["role"], self.project))
            if not taken:
                reason = (
                    "there is no such token" if row is None
                    else "the token was used before" if row["used"] is not None
                    else "the token has expired"
                )  # fmt: skip
                raise Refused(
                    401, f"{reason}; ask for a new one: atoll invite STATE NAME",
                    audited="enrolment",
                )  # fmt: skip
            assert row is not None
            change.run(sites.delete().where(sites.c.name == row["name"]))
            change.run(
                sites.insert().values(
                    name=row["name"], key=message.key, role=row["role"], status="active",
                    joined=now, seen=now, examples=0, about="{}",
                )
            )  # fmt: skip
            change.audit(row["name"], "enrolled", role=row["role"], key=message.key)
        conductor.saw(row["name"])
        return _json(messages.Enrolled(row["name"], row["role"], self.project))

    async def challenge(self, request: Request) -> Response:
        message = messages.read(messages.Challenge, await short_body(request))
        self._leading()
        nonce = self.sessions.challenge(message.site)
        return _json(messages.Challenge(message.site, nonce))

    async def session(self, request: Request) -> Response:
        message = messages.read(messages.OpenSession, await short_body(request))
        conductor = self._leading()
        row = conductor.store.site(message.site)
        signed = row is not None and verified(
            row["key"], message.signature, OPEN + bytes.fromhex(message.nonce)
        )
        # Only what was signed uses a challenge up.
        if row is None or not (signed and self.sessions.answered(message.site, message.nonce)):
            raise Refused(401, "this is not a site's answer to its challenge", audited="session")
        if row["status"] != "active":
            raise Refused(403, f"{message.site} was revoked", audited="session")
        session = self.sessions.open(message.site, row["role"])
        return _json(
            messages.SessionOpened(
                session.id, session.key.hex(), session.expires - time.monotonic()
            )
        )

    async def checkin(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self._who(request, "site", body)).site
        message = messages.read(messages.CheckIn, body)
        conductor = self._leading()
        for what, theirs, ours in (
            ("plan", message.plan, conductor.plan_digest),
            ("layout", message.layout, conductor.layout_digest),
        ):
            if theirs != ours:
                self.measures.refused("mismatch")
                problem = messages.Problem(
                    f"the {what} of {site}'s copy of the federation is another than the server's: "
                    "compare the two files",
                    {"site's": theirs, "server's": ours},
                )
                return Response(messages.write(problem), 409, media_type="application/json")
        about = json.dumps(message.about, sort_keys=True)
        conductor.saw(site, message.examples, about)
        if message.busy is not None:
            row = conductor.open.get(site)
            on = row is not None and row["id"] == message.busy
            return _json(messages.Order("go on" if on else "drop"))
        wait = min(seconds(request.query_params.get("wait", "0")), LONGEST_WAIT)
        return _json(await self._order(conductor, site, wait, message.farewell))

    async def _order(
        self, conductor: Conductor, site: str, wait: float, farewell: bool
    ) -> messages.Order:
        """What a site is to do, once there is something or after `wait` seconds."""
        until = time.monotonic() + wait
        rounds_ = conductor.plan.schedule.rounds
        while True:
            conductor.seen[site] = conductor.clock()
            news = conductor.changed
            row = conductor.open.get(site)
            version = conductor.version
            if row is not None and not conductor.stopping:
                began = version
                if row["version"] != version["version"]:
                    began = conductor.store.version(row["version"]) or version
                return messages.Order(
                    "train",
                    assignment=row["id"],
                    round=row["round"],
                    rounds=rounds_,
                    turn=row["turn"],
                    fraction=row["fraction"],
                    seed=conductor.service.seed,
                    model=began["broadcast"],
                    size=conductor.vault.blobs.size(began["broadcast"]),
                    memory=conductor.memory_of(site),
                )
            if conductor.done:
                if farewell:
                    conductor.told.add(site)
                return messages.Order(
                    "stop",
                    round=version["version"],
                    rounds=rounds_,
                    model=version["model"],
                    size=conductor.vault.blobs.size(version["model"]),
                    memory=conductor.memory_of(site),
                    reason="the federation was stopped"
                    if conductor.stopping
                    else "all rounds are done",
                )
            left = until - time.monotonic()
            if left <= 0 or self.parked >= PARKED or self.closing.is_set():
                self.pace.arrived(conductor.clock())
                window = self.pace.window(wait > 0 and left <= 0)
                return messages.Order("wait", round=version["version"], rounds=rounds_, wait=window)
            self.parked += 1
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left)
            finally:
                self.parked -= 1

    async def blob(self, request: Request) -> Response:
        await self._who(request, None, b"")
        conductor, digest = self._leading(), request.path_params["digest"]
        if not DIGEST.fullmatch(digest):
            raise Refused(404, "a blob is named by its SHA-256")
        known = conductor.store.rows(versions_named(digest))
        if not known:
            raise Refused(404, f"there is no model {digest}")
        try:
            size = conductor.vault.blobs.size(digest)
        except BlobMissing as error:
            raise Refused(404, str(error)) from None
        start, stop, status = byte_range(request.headers.get("range"), size)
        headers = {
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Length": str(stop - start),
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        elif request.headers.get("if-none-match") == f'"{digest}"':
            return Response(status_code=304, headers={"ETag": f'"{digest}"'})
        self.measures.sent(stop - start)
        return StreamingResponse(
            pieces(conductor, digest, start, stop), status, headers, "application/octet-stream"
        )

    async def offer(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self._who(request, "site", body)).site
        message = messages.read(messages.Offer, body)
        conductor = self._leading()
        if message.size > conductor.largest:
            raise Refused(
                413,
                f"an update of this federation has at most {conductor.largest} bytes, not "
                f"{message.size}",
                audited="upload",
            )
        found = conductor.offer(site, message.assignment, message.size, message.sha256)
        if isinstance(found, Answer):
            if found.verdict is Verdict.UNKNOWN:
                raise Refused(403, found.reason, audited="upload")
            return _verdict(found)
        return Response(
            status_code=201,
            headers={
                "Location": f"/v1/uploads/{found['id']}",
                "Upload-Offset": str(length(conductor.vault.part(found["id"]))),
            },
        )

    async def offset(self, request: Request) -> Response:
        row = await self._own_upload(request)
        have = length(self._leading().vault.part(row["id"]))
        return Response(headers={"Upload-Offset": str(have), "Upload-Length": str(row["size"])})

    async def append(self, request: Request) -> Response:
        row = await self._own_upload(request)
        conductor = self._leading()
        if row["id"] in self._uploading:
            raise Refused(423, "another request is writing this upload", headers=_soon())
        self._uploading.add(row["id"])
        try:
            return await self._append(request, conductor, row)
        finally:
            self._uploading.discard(row["id"])

    async def _append(self, request: Request, conductor: Conductor, row: Row) -> Response:
        path = conductor.vault.part(row["id"])
        at = length(path)
        claimed = request.headers.get("upload-offset", "")
        if claimed != str(at):
            raise Refused(
                409, f"the upload stands at {at}, not {claimed or 'nowhere'}: ask with HEAD",
                headers={"Upload-Offset": str(at)},
            )  # fmt: skip
        conductor.seen[row["site"]] = conductor.clock()
        try:
            with path.open("ab", buffering=0) as file:
                async for block in gathered(request, row["size"] - at):
                    await asyncio.to_thread(file.write, block)
                    at += len(block)
                    conductor.seen[row["site"]] = conductor.clock()
                await asyncio.to_thread(os.fsync, file.fileno())
        finally:
            self.measures.received(at - int(claimed))
        if at < row["size"]:
            return Response(status_code=204, headers={"Upload-Offset": str(at)})
        found = await asyncio.to_thread(file_digest, path)
        if found != row["digest"]:
            path.unlink(missing_ok=True)
            raise Refused(
                422, f"the bytes have SHA-256 {found}, not {row['digest']} as declared",
                audited="upload", headers={"Upload-Offset": "0"},
            )  # fmt: skip
        answer = await conductor.deliver(row)
        if not answer.accepted:
            self.measures.refused(str(answer.verdict))
        return _verdict(answer)

    async def fail(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self._who(request, "site", body)).site
        message = messages.read(messages.Failure, body)
        owed = self._leading().give_up(site, request.path_params["assignment"], message.reason)
        if not owed:
            raise Refused(410, f"{site} owes no such update")
        return Response(status_code=204)

    async def status(self, request: Request) -> Response:
        await self._who(request, "analyst", b"")
        conductor = self._leading()
        return JSONResponse(
            {
                "project": self.project,
                "round": conductor.version["version"],
                "rounds": conductor.plan.schedule.rounds,
                "phase": "stopping" if conductor.stopping else str(conductor.coordinator.phase),
                "sites": len(conductor.active),
                "at_work": sorted(conductor.open),
                "model": conductor.version["model"],
            }
        )

    async def rounds(self, request: Request) -> Response:
        await self._who(request, "analyst", b"")
        rows = self._leading().store.rows(
            sa.select(rounds).order_by(rounds.c.round.desc()).limit(500)
        )
        return JSONResponse([{**row, "record": json.loads(row["record"])} for row in rows])

    async def sites(self, request: Request) -> Response:
        await self._who(request, "analyst", b"")
        conductor = self._leading()
        return JSONResponse(
            [
                {
                    **{
                        name: row[name] for name in ("name", "role", "status", "joined", "examples")
                    },
                    "seen": conductor.seen.get(row["name"], row["seen"]),
                }
                for row in conductor.store.sites()
            ]
        )

    async def revoke(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self._who(request, "admin", body)).site
        conductor, site = self._leading(), request.path_params["site"]
        if conductor.store.site(site) is None:
            raise Refused(404, f"there is no site {site!r}")
        with conductor.store.change() as change:
            change.run(sites.update().where(sites.c.name == site).values(status="revoked"))
            change.audit(who, "revoked", site=site)
        conductor.revoked(site)
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self._who(request, "admin", body)).site
        self._leading().stop(who)
        return Response(status_code=204)

    async def _own_upload(self, request: Request) -> Row:
        """The upload a request is about, if it is the asking site's."""
        offset = request.headers.get("upload-offset", "")
        coming = request.headers.get("content-length", "")
        body = f"{offset}:{coming}" if request.method == "PATCH" else b""
        site = (await self._who(request, "site", body)).site
        row = self._leading().store.upload(request.path_params["upload"])
        if row is None:
            raise Refused(410, "there is no such upload; it may have been decided upon: offer it")
        if row["site"] != site:
            raise Refused(403, "this is another site's upload", audited="upload")
        return row

    async def _who(self, request: Request, role: Role | None, body: bytes | str) -> Session:
        """Who sealed this request; it must be of this role (or above it), and still welcome.

        `body` is the body itself, or what stands for a body that is yet to come.
        """
        conductor = self._leading()
        session = self.sessions.find(request.headers.get("atoll-session", ""))
        if session is None:
            raise Refused(401, "there is no such session, or it has ended: open one")
        text = body if isinstance(body, str) else sha256(body).hexdigest()
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        counter = request.headers.get("atoll-counter", "")
        good = counter.isdecimal() and len(counter) < 16 and hmac.compare_digest(
            seal(session.key, request.method, target, int(counter), text),
            request.headers.get("atoll-seal", ""),
        )  # fmt: skip
        if not good:
            raise Refused(401, "the seal does not fit the request", audited="seal")
        if not session.take(int(counter)):
            raise Refused(409, "this request was made before", audited="replay")
        row = conductor.store.site(session.site)
        if row is None or row["status"] != "active":
            raise Refused(403, f"{session.site} was revoked", audited="revoked")
        may = {None: ("site", "analyst", "admin"), "analyst": ("analyst", "admin")}
        if row["role"] not in may.get(role, (role,)):
            raise Refused(
                403, f"this is for the role {role}, and {session.site} is {row['role']}",
                audited="role",
            )  # fmt: skip
        return session

    def _leading(self) -> Conductor:
        if self.conductor is None or self.conductor.failed is not None:
            raise Refused(503, "this process does not lead the federation now", headers=_soon())
        return self.conductor

    def _counted(
        self, endpoint: Callable[[Request], Awaitable[Response]], path: str
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint, with its refusals turned into sentences, counted and audited."""

        async def handle(request: Request) -> Response:
            started, status = time.perf_counter(), 500
            try:
                encoding = request.headers.get("content-encoding", "identity")
                if encoding != "identity":
                    raise Refused(415, f"bodies come as they are, not as {encoding[:20]!r}")
                response = await endpoint(request)
                status = response.status_code
                return response
            except ClientDisconnect:
                status = 499
                return Response(status_code=499)
            except NotLeading as error:
                status = 503
                raise Refused(503, str(error), headers=_soon()) from None
            except messages.MessageError as error:
                status = 400
                self.measures.refused("message")
                raise Refused(400, str(error)[:500]) from None
            except Refused as refusal:
                status = refusal.status_code
                if refusal.audited:
                    self._audit(request, refusal)
                raise
            except AtollError as error:
                status = 500
                raise Refused(500, str(error)[:500]) from None
            finally:
                self.measures.request(request.method, path, status, time.perf_counter() - started)

        return handle

    def _audit(self, request: Request, refusal: Refused) -> None:
        """Keep who was refused what; a flood of refusals is counted, and only sampled here."""
        self.measures.refused(refusal.audited)
        session = self.sessions.find(request.headers.get("atoll-session", ""))
        actor = session.site if session else (request.client.host if request.client else "unknown")
        logger.warning("%s was refused (%s): %s", actor, refusal.audited, refusal.detail)
        if self.conductor is not None and self.pace.may_audit():
            with contextlib.suppress(NotLeading), self.conductor.store.change() as change:
                change.audit(
                    actor, "refused", what=refusal.audited, status=refusal.status_code,
                    reason=refusal.detail[:200],
                )  # fmt: skip


def _soon() -> dict[str, str]:
    return {"Retry-After": str(random.randint(1, 3))}


def _verdict(answer: Answer) -> Response:
    message = messages.Verdict(str(answer.verdict), answer.reason[:1000])
    return _json(message, STATUS[answer.verdict])


def _json(message: messages.Message, status: int = 200) -> Response:
    return Response(messages.write(message), status, media_type="application/json")


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = messages.write(messages.Problem(str(error.detail)[:1000]))
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _broken(request: Request, error: Exception) -> Response:
    body = messages.write(messages.Problem("the server failed; its log says how"))
    return Response(body, 500, media_type="application/json")
