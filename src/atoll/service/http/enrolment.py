"""Enrolment with a one-time token, and sessions."""

from __future__ import annotations

import logging
import time

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from atoll.protocol import messages
from atoll.protocol.identity import (
    ENROL,
    OPEN,
    token_digest,
    verified,
)
from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import (
    Refused,
    answered,
    short_body,
)
from atoll.service.storage.tables import sites, tokens

logger = logging.getLogger("atoll.service")


class EnrolmentApi:
    """How a key becomes a site, and a site gets a session."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints

    async def ca(self, request: Request) -> Response:
        return Response(self.endpoints.authority, media_type="application/x-pem-file")

    async def enrol(self, request: Request) -> Response:
        message = messages.read(messages.Enrol, await short_body(request))
        loop, digest = self.endpoints.leading(), token_digest(message.secret)
        now = loop.clock()
        if not verified(message.key, message.signature, ENROL + bytes.fromhex(message.secret)):
            raise Refused(401, "the signature is not the key's", audited="enrolment")
        with loop.store.change() as change:
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
                    return answered(
                        messages.Enrolled(row["name"], row["role"], self.endpoints.project)
                    )
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
            other = change.connection.execute(
                sa.select(sites.c.name).where(
                    sites.c.key == message.key, sites.c.name != row["name"]
                )
            ).scalar()
            if other is not None:
                raise Refused(
                    403, f"this key is {other}'s already; each site makes its own",
                    audited="enrolment",
                )  # fmt: skip
            change.run(sites.delete().where(sites.c.name == row["name"]))
            change.run(
                sites.insert().values(
                    name=row["name"], key=message.key, role=row["role"], status="active",
                    joined=now, seen=now, examples=0, about="{}",
                )
            )  # fmt: skip
            change.audit(row["name"], "enrolled", role=row["role"], key=message.key)
        logger.info("%s has joined", row["name"])
        return answered(messages.Enrolled(row["name"], row["role"], self.endpoints.project))

    async def challenge(self, request: Request) -> Response:
        message = messages.read(messages.Challenge, await short_body(request))
        self.endpoints.leading()
        nonce = self.endpoints.sessions.challenge(message.site)
        return answered(messages.Challenge(message.site, nonce))

    async def session(self, request: Request) -> Response:
        message = messages.read(messages.OpenSession, await short_body(request))
        loop = self.endpoints.leading()
        row = loop.store.site(message.site)
        signed = row is not None and verified(
            row["key"], message.signature, OPEN + bytes.fromhex(message.nonce)
        )
        # Only what was signed uses a challenge up.
        if row is None or not (
            signed and self.endpoints.sessions.answered(message.site, message.nonce)
        ):
            raise Refused(401, "this is not a site's answer to its challenge", audited="session")
        if row["status"] != "active":
            raise Refused(403, f"{message.site} was revoked", audited="session")
        session = self.endpoints.sessions.open(message.site, row["role"], row["key"])
        return answered(
            messages.SessionOpened(
                session.id, session.key.hex(), session.expires - time.monotonic()
            )
        )
