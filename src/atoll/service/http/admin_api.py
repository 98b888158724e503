"""Admin API: health, metrics, status, and what admins do."""

from __future__ import annotations

import hmac
import json
import re

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import (
    Refused,
    short_body,
)
from atoll.service.http.openapi import description
from atoll.service.storage.tables import rounds, sites

SITE = re.compile(r"[A-Za-z0-9 ._-]{1,64}")
SHOWN = ("name", "role", "status", "joined", "examples")


class AdminApi:
    """What operators, analysts and admins ask."""

    def __init__(self, desk: Endpoints) -> None:
        self.desk = desk

    async def health(self, request: Request) -> Response:
        leads = self.desk.conductor is not None
        return JSONResponse(
            {"status": "ok" if leads else "standby", "project": self.desk.project},
            200 if leads else 503,
        )

    async def metrics(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.desk.metrics_token.encode()):
            raise Refused(
                401, "give the token in the state folder's file metrics.token as a bearer token"
            )
        return Response(
            self.desk.measures.exposition(
                self.desk.conductor, len(self.desk.sessions), self.desk.parked
            ),
            media_type="text/plain; version=0.0.4",
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description())

    async def status(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        conductor = self.desk.leading()
        return JSONResponse(
            {
                "project": self.desk.project,
                "round": conductor.version["version"],
                "rounds": conductor.plan.schedule.rounds,
                "phase": "stopping" if conductor.stopping else str(conductor.coordinator.phase),
                "waiting_for": conductor.waiting,
                "sites": len(conductor.members.names),
                "at_work": sorted(conductor.open),
                "model": conductor.version["model"],
            }
        )

    async def rounds(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        rows = self.desk.leading().store.rows(
            sa.select(rounds).order_by(rounds.c.round.desc()).limit(500)
        )
        return JSONResponse([{**row, "record": json.loads(row["record"])} for row in rows])

    async def sites(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        conductor = self.desk.leading()
        return JSONResponse(
            [
                {
                    **{
                        name: row[name] for name in ("name", "role", "status", "joined", "examples")
                    },
                    "seen": conductor.members.heard.get(row["name"], row["seen"]),
                }
                for row in conductor.store.sites()
            ]
        )

    async def revoke(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.desk.who(request, "admin", body)).site
        conductor, site = self.desk.leading(), request.path_params["site"]
        if not SITE.fullmatch(site) or conductor.store.site(site) is None:
            raise Refused(404, f"there is no site {site!r}")
        with conductor.store.change() as change:
            change.run(sites.update().where(sites.c.name == site).values(status="revoked"))
            change.audit(who, "revoked", site=site)
        conductor.revoked(site)
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.desk.who(request, "admin", body)).site
        self.desk.leading().stop(who)
        return Response(status_code=204)
