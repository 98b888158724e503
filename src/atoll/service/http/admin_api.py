"""Admin API: health, metrics, status, and what admins do."""

from __future__ import annotations

import hmac
import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atoll.service import operations
from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import Refused, short_body
from atoll.service.http.openapi import description

ROUND = re.compile(r"[0-9]{1,9}")


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
        return JSONResponse(description(request.app.routes))

    async def status(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        conductor = self.desk.leading()
        return JSONResponse(
            operations.status(conductor.store, self.desk.project, conductor.waiting)
        )

    async def rounds(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        since = request.query_params.get("since", "0")
        if not ROUND.fullmatch(since):
            raise Refused(400, "since is the number of a round")
        return JSONResponse(operations.rounds(self.desk.leading().store, int(since)))

    async def sites(self, request: Request) -> Response:
        await self.desk.who(request, "analyst", b"")
        return JSONResponse(operations.sites(self.desk.leading().store))

    async def revoke(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.desk.who(request, "admin", body)).site
        conductor, site = self.desk.leading(), request.path_params["site"]
        try:
            with conductor.store.change() as change:
                operations.revoke(change, who, site)
        except operations.UnknownSite as error:
            raise Refused(404, str(error)) from None
        conductor.revoked(site)
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.desk.who(request, "admin", body)).site
        self.desk.leading().stop(who)
        return Response(status_code=204)
