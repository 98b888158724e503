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

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints

    async def health(self, request: Request) -> Response:
        leads = self.endpoints.loop is not None
        return JSONResponse(
            {"status": "ok" if leads else "standby", "project": self.endpoints.project},
            200 if leads else 503,
        )

    async def metrics(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.endpoints.metrics_token.encode()):
            raise Refused(
                401, "give the token in the state folder's file metrics.token as a bearer token"
            )
        return Response(
            self.endpoints.measures.exposition(
                self.endpoints.loop, len(self.endpoints.sessions), self.endpoints.parked
            ),
            media_type="text/plain; version=0.0.4",
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description(request.app.routes))

    async def status(self, request: Request) -> Response:
        await self.endpoints.who(request, "analyst", b"")
        loop = self.endpoints.leading()
        return JSONResponse(operations.status(loop.store, self.endpoints.project))

    async def rounds(self, request: Request) -> Response:
        await self.endpoints.who(request, "analyst", b"")
        since = request.query_params.get("since", "0")
        if not ROUND.fullmatch(since):
            raise Refused(400, "since is the number of a round")
        return JSONResponse(operations.rounds(self.endpoints.leading().store, int(since)))

    async def sites(self, request: Request) -> Response:
        await self.endpoints.who(request, "analyst", b"")
        return JSONResponse(operations.sites(self.endpoints.leading().store))

    async def revoke(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.endpoints.who(request, "admin", body)).site
        loop, site = self.endpoints.leading(), request.path_params["site"]
        try:
            with loop.store.change() as change:
                operations.revoke(change, who, site)
        except operations.UnknownSite as error:
            raise Refused(404, str(error)) from None
        loop.revoked(site)
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        body = await short_body(request)
        who = (await self.endpoints.who(request, "admin", body)).site
        self.endpoints.leading().stop(who)
        return Response(status_code=204)
