"""Site API: what a site does; check in, fetch a model, send an update."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from hashlib import sha256
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from atoll.core.files import Hash, begin_writing, file_hash
from atoll.protocol import messages
from atoll.rounds.coordinator import Answer, Verdict
from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import (
    Refused,
    answered,
    byte_range,
    gathered,
    length,
    pieces,
    seconds,
    short_body,
    soon,
    versions_named,
)
from atoll.service.loop import FederationLoop
from atoll.service.meanings import disagreement
from atoll.service.storage.blobs import DIGEST, BlobMissing
from atoll.service.storage.database import Row

LONGEST_WAIT = 60.0
#: Seconds after which a site at work is to say that it still is, or a third of its lease.
HEARTBEAT = 20.0
#: Long polls that are parked at the same time; others are told when to come again.
PARKED = 20_000
UPLOAD = re.compile(r"[0-9a-f]{32}")
ASSIGNMENT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12}){2}")
STATUS = {
    Verdict.ACCEPTED: 200,
    Verdict.DUPLICATE: 200,
    Verdict.NOT_NEEDED: 410,
    Verdict.LATE: 410,
    Verdict.STALE: 410,
    Verdict.UNKNOWN: 404,
    Verdict.MALFORMED: 422,
}


logger = logging.getLogger("atoll.service")

#: What sites are told in the end.
WHY = {
    "done": "all rounds are done",
    "stopped": "the federation was stopped",
    "given up": "the federation was given up: too many rounds or updates failed",
}


class SiteApi:
    """A site's round, seen from the server."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._uploading: set[str] = set()

    async def checkin(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self.endpoints.who(request, "site", body)).site
        message = messages.read(messages.CheckIn, body)
        loop = self.endpoints.leading()
        for what, theirs, ours in (
            ("plan", message.plan, loop.plan_digest),
            ("layout", message.layout, loop.layout_digest),
        ):
            if theirs != ours:
                self.endpoints.measures.refused("mismatch")
                loop.left(site, f"its copy of the federation has another {what}")
                problem = messages.Problem(
                    f"the {what} of {site}'s copy of the federation is another than the server's: "
                    "compare the two files",
                    {"site's": theirs, "server's": ours, messages.PLAN: loop.described},
                )
                return Response(messages.write(problem), 409, media_type="application/json")
        reason = disagreement(loop.store, site, message)
        if reason:
            self.endpoints.measures.refused("mismatch")
            loop.left(site, reason)
            problem = messages.Problem(reason[:1000], {"meaning": "compare the two data sets"})
            return Response(messages.write(problem), 409, media_type="application/json")
        if loop.members.doubled(site, message.agent):
            logger.warning(
                "two agents are at work as %s: one of them has a copy of its folder; stop one", site
            )
        if message.farewell and not loop.done:
            loop.left(site, "it said that it leaves")
            return answered(messages.Order("drop"))
        about = json.dumps(message.about, sort_keys=True)
        loop.members.saw(site, message.examples, about)
        if message.busy is not None:
            row = loop.open.get(site)
            on = row is not None and row["id"] == message.busy
            return answered(messages.Order("go on" if on else "drop"))
        wait = min(seconds(request.query_params.get("wait", "0")), LONGEST_WAIT)
        return answered(await self._order(loop, site, wait, message.farewell, message.held_out))

    async def _order(
        self, loop: FederationLoop, site: str, wait: float, farewell: bool, held_out: int = 0
    ) -> messages.Order:
        """What a site is to do, once there is something or after `wait` seconds."""
        until = time.monotonic() + wait
        rounds_ = loop.plan.schedule.rounds
        beat = min(HEARTBEAT, loop.service.lease / 3)
        while True:
            if site in loop.members.absent:
                return messages.Order("drop")  # it has left meanwhile
            loop.members.saw(site)
            news = loop.changed
            row = loop.open.get(site)
            version = loop.version
            at = version["version"]
            if held_out and not farewell and loop.measuring.wanted(site, at, done=loop.done):
                loop.measuring.ask(site, at, held_out)
                return messages.Order(
                    "measure", round=at, rounds=rounds_, seed=loop.service.seed,
                    model=version["broadcast"], size=loop.models.size(version["broadcast"]),
                    memory=loop.memory_of(site), assignment=row["id"] if row else None,
                    wait=(beat, beat),
                )  # fmt: skip
            if row is not None and not loop.stopping:
                began = version
                if row["version"] != version["version"]:
                    began = loop.store.version(row["version"]) or version
                question, models = loop.question, loop.models
                told = question.told if question else ""
                mail = question.mail.get(site, "") if question else ""
                return messages.Order(
                    "train",
                    assignment=row["id"],
                    round=row["round"],
                    rounds=rounds_,
                    turn=row["turn"],
                    fraction=row["fraction"],
                    seed=loop.service.seed,
                    model=began["broadcast"],
                    size=loop.models.size(began["broadcast"]),
                    memory=loop.memory_of(site),
                    exchange=question.step if question else 0,
                    question=question.name if question else "update",
                    owner="algorithm" if question and question.owner == "algorithm" else "reducer",
                    works=question.works if question else True,
                    told=told or None,
                    told_size=models.size(told) if told else 0,
                    mail=mail or None,
                    mail_size=models.size(mail) if mail else 0,
                    wait=(beat, beat),
                )
            if loop.done:
                if farewell:
                    loop.members.told.add(site)
                return messages.Order(
                    "stop",
                    round=version["version"],
                    rounds=rounds_,
                    model=version["model"],
                    size=loop.models.size(version["model"]),
                    memory=loop.memory_of(site),
                    reason=WHY[loop.outcome],
                    outcome=loop.outcome,
                )
            left = until - time.monotonic()
            if left <= 0 or self.endpoints.parked >= PARKED or self.endpoints.closing.is_set():
                self.endpoints.pace.arrived(loop.clock())
                window = self.endpoints.pace.window(wait > 0 and left <= 0)
                return messages.Order("wait", round=version["version"], rounds=rounds_, wait=window)
            self.endpoints.parked += 1
            loop.members.parked.add(site)
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left)
            finally:
                self.endpoints.parked -= 1
                loop.members.parked.discard(site)

    async def blob(self, request: Request) -> Response:
        site = (await self.endpoints.who(request, None, b"")).site
        loop, digest = self.endpoints.leading(), request.path_params["digest"]
        if not DIGEST.fullmatch(digest):
            raise Refused(404, "a blob is named by its SHA-256")
        if not loop.may_read(site, digest) and not loop.store.rows(versions_named(digest)):
            raise Refused(404, f"there is no model {digest}")
        try:
            size = loop.models.blobs.size(digest)
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
        self.endpoints.measures.sent(stop - start)
        return StreamingResponse(
            pieces(loop, site, digest, start, stop),
            status,
            headers,
            "application/octet-stream",
        )

    async def offer(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self.endpoints.who(request, "site", body)).site
        message = messages.read(messages.Offer, body)
        loop = self.endpoints.leading()
        if message.size > loop.largest:
            raise Refused(
                413,
                f"an update of this federation has at most {loop.largest} bytes, not "
                f"{message.size}",
                audited="upload",
            )
        found = loop.offer(
            site, message.assignment, message.size, message.sha256, message.exchange, message.model
        )
        if isinstance(found, Answer):
            if found.verdict is Verdict.UNKNOWN:
                raise Refused(403, found.reason, audited="upload")
            return verdict_of(found)
        return Response(
            status_code=201,
            headers={
                "Location": f"/v1/uploads/{found['id']}",
                "Upload-Offset": str(length(loop.models.part(found["id"]))),
            },
        )

    async def offset(self, request: Request) -> Response:
        row = await self._own_upload(request)
        have = length(self.endpoints.leading().models.part(row["id"]))
        return Response(headers={"Upload-Offset": str(have), "Upload-Length": str(row["size"])})

    async def append(self, request: Request) -> Response:
        row = await self._own_upload(request)
        loop = self.endpoints.leading()
        if row["id"] in self._uploading:
            raise Refused(423, "another request is writing this upload", headers=soon())
        self._uploading.add(row["id"])
        try:
            return await self._append(request, loop, row)
        finally:
            self._uploading.discard(row["id"])

    async def _append(self, request: Request, loop: FederationLoop, row: Row) -> Response:
        path = loop.models.part(row["id"])
        at = length(path)
        claimed = request.headers.get("upload-offset", "")
        if claimed != str(at):
            raise Refused(
                409, f"the upload stands at {at}, not {claimed or 'nowhere'}: ask with HEAD",
                headers={"Upload-Offset": str(at)},
            )  # fmt: skip
        loop.members.saw(row["site"])
        body = await asyncio.to_thread(file_hash, path) if at else sha256()
        try:
            with path.open("ab") as file:
                async for block in gathered(request, row["size"] - at):
                    await asyncio.to_thread(_taken, file, block, body)
                    at += len(block)
                    loop.members.saw(row["site"])
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
        finally:
            self.endpoints.measures.received(at - int(claimed))
        if loop.store.upload(row["id"]) is None:
            raise Refused(410, "another offer for this assignment has taken its place")
        if at < row["size"]:
            return Response(status_code=204, headers={"Upload-Offset": str(at)})
        found = body.hexdigest()
        if found != row["digest"]:
            path.unlink(missing_ok=True)
            raise Refused(
                422, f"the bytes have SHA-256 {found}, not {row['digest']} as declared",
                audited="upload", headers={"Upload-Offset": "0"},
            )  # fmt: skip
        answer = await loop.deliver(row)
        if not answer.accepted:
            self.endpoints.measures.refused(str(answer.verdict))
        return verdict_of(answer)

    async def fail(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self.endpoints.who(request, "site", body)).site
        message = messages.read(messages.Failure, body)
        loop, assignment = self.endpoints.leading(), request.path_params["assignment"]
        if not ASSIGNMENT.fullmatch(assignment):
            raise Refused(404, "an assignment is named by three numbers")
        row = loop.store.assignment(assignment)
        if row is not None and row["site"] != site:
            raise Refused(403, "this is another site's assignment", audited="upload")
        owed = loop.give_up(site, assignment, message.reason)
        if not owed:
            raise Refused(410, f"{site} owes no such update")
        return Response(status_code=204)

    async def measured(self, request: Request) -> Response:
        body = await short_body(request)
        site = (await self.endpoints.who(request, "site", body)).site
        message = messages.read(messages.Measured, body)
        loop = self.endpoints.leading()
        reason = loop.measuring.told(site, message)
        if reason:
            raise Refused(410, reason)
        return Response(status_code=204)

    async def _own_upload(self, request: Request) -> Row:
        """The upload a request is about, if it is the asking site's."""
        offset = request.headers.get("upload-offset", "")
        coming = request.headers.get("content-length", "")
        body = f"{offset}:{coming}" if request.method == "PATCH" else b""
        site = (await self.endpoints.who(request, "site", body)).site
        id = request.path_params["upload"]
        row = self.endpoints.leading().store.upload(id) if UPLOAD.fullmatch(id) else None
        if row is None:
            raise Refused(410, "there is no such upload; it may have been decided upon: offer it")
        if row["site"] != site:
            raise Refused(403, "this is another site's upload", audited="upload")
        return row


def _taken(file: BinaryIO, block: bytes, body: Hash) -> None:
    """Write a block, and have the disk begin with it."""
    file.write(block)
    body.update(block)
    begin_writing(file, len(block))


def verdict_of(answer: Answer) -> Response:
    message = messages.Verdict(str(answer.verdict), answer.reason[:1000])
    return answered(message, STATUS[answer.verdict])
