"""What all endpoints share: who asks, and refusals that are counted and audited."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256

import sqlalchemy as sa
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from atoll.errors import AtollError
from atoll.protocol import messages
from atoll.protocol.identity import (
    Role,
    Session,
    Sessions,
    seal,
)
from atoll.service.http.bodies import (
    Refused,
    soon,
)
from atoll.service.http.measures import Measures
from atoll.service.http.pace import Pace
from atoll.service.loop import FederationLoop
from atoll.service.storage.database import NotLeading, said_by

logger = logging.getLogger("atoll.service")


class Endpoints:
    """One server process as its endpoints see it.

    Args:
        authority: the project's certificate (PEM), which anyone may have.
        project: the project's name.
        metrics_token: what `/metrics` asks for.
    """

    def __init__(self, authority: bytes, project: str, metrics_token: str) -> None:
        #: What decides; None while another process leads.
        self.loop: FederationLoop | None = None
        self.authority, self.project = authority, project
        self.metrics_token = metrics_token
        self.sessions = Sessions(time.monotonic)
        self.measures = Measures()
        self.pace = Pace()
        self.parked = 0
        self.closing = asyncio.Event()

    async def who(self, request: Request, role: Role | None, body: bytes | str) -> Session:
        """Who sealed this request; it must be of this role (or above it), and still welcome.

        `body` is the body itself, or what stands for a body that is yet to come.
        """
        loop = self.leading()
        session = self.sessions.find(request.headers.get("atoll-session", ""))
        if session is None:
            raise Refused(401, "there is no such session, or it has ended: open one")
        text = body if isinstance(body, str) else sha256(body).hexdigest()
        query = request.scope["query_string"].decode("latin-1")
        target = request.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        counter = request.headers.get("atoll-counter", "")
        good = counter.isdecimal() and len(counter) < 16 and hmac.compare_digest(
            seal(session.key, request.method, target, int(counter), text).encode(),
            request.headers.get("atoll-seal", "").encode(),
        )  # fmt: skip
        if not good:
            raise Refused(401, "the seal does not fit the request", audited="seal")
        if not session.take(int(counter)):
            raise Refused(409, "this request was made before", audited="replay")
        row = loop.store.site(session.site)
        # A name may have been given to another key since.
        if row is None or row["status"] != "active" or row["key"] != session.public:
            raise Refused(403, f"{session.site} was revoked", audited="revoked")
        may = {None: ("site", "analyst", "admin"), "analyst": ("analyst", "admin")}
        if row["role"] not in may.get(role, (role,)):
            raise Refused(
                403, f"this is for the role {role}, and {session.site} is {row['role']}",
                audited="role",
            )  # fmt: skip
        return session

    def leading(self) -> FederationLoop:
        if self.loop is None or self.loop.failed is not None:
            raise Refused(503, "this process does not lead the federation now", headers=soon())
        return self.loop

    def counted(
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
                raise Refused(503, str(error), headers=soon()) from None
            except messages.MessageError as error:
                status = 400
                self.measures.refused("message")
                raise Refused(400, str(error)[:500]) from None
            except Refused as refusal:
                status = refusal.status_code
                self.measures.refused(refusal.audited or str(status))
                if refusal.audited:
                    self._audit(request, refusal)
                raise
            except (OSError, sa.exc.DBAPIError) as error:
                reason = unstored(error)
                if reason is None:
                    raise
                status = 507
                logger.error("%s of %s could not be kept: %s", request.method, path, reason)
                raise Refused(507, f"the server cannot keep this now: {reason}") from None
            except AtollError as error:
                status = 500
                raise Refused(500, str(error)[:500]) from None
            finally:
                self.measures.request(request.method, path, status, time.perf_counter() - started)

        return handle

    def _audit(self, request: Request, refusal: Refused) -> None:
        """Keep who was refused what; a flood of refusals is counted, and only sampled here."""
        session = self.sessions.find(request.headers.get("atoll-session", ""))
        actor = session.site if session else (request.client.host if request.client else "unknown")
        logger.warning("%s was refused (%s): %s", actor, refusal.audited, refusal.detail)
        if self.loop is not None and self.pace.may_audit():
            with contextlib.suppress(NotLeading), self.loop.store.change() as change:
                change.audit(
                    actor, "refused", what=refusal.audited, status=refusal.status_code,
                    reason=refusal.detail[:200],
                )  # fmt: skip


def unstored(error: OSError | sa.exc.DBAPIError) -> str | None:
    """Why something could not be kept, if it is for want of space or of the database."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return said_by(error)
