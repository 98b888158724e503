"""The API's description (OpenAPI 3.1), derived from the messages."""

from __future__ import annotations

from typing import Any

from atoll.protocol import messages

SEAL = [
    {"name": "Atoll-Session", "in": "header", "required": True, "schema": {"type": "string"}},
    {
        "name": "Atoll-Counter",
        "in": "header",
        "required": True,
        "description": "Taken once in a session, in any order within the last 64.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
    },
    {
        "name": "Atoll-Seal",
        "in": "header",
        "required": True,
        "description": "HMAC-SHA256 (hex) with the session's key over method, target, counter and "
        "the SHA-256 (hex) of the body, each on a line. For PATCH, 'offset:length' stands "
        "for the body, which the offer's SHA-256 binds.",
        "schema": {"type": "string"},
    },
]
DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def description() -> dict[str, Any]:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "atoll federation",
            "version": "1",
            "description": "Sites dial out to one port, over TLS 1.3. Control messages are JSON of "
            "closed schemas; tensors are raw bodies in the safetensors layout.",
        },
        "paths": {
            "/health": {"get": _plain("Whether this process leads", {200: None, 503: None})},
            "/metrics": {
                "get": {
                    **_plain("Prometheus text", {200: None, 401: "Problem"}),
                    "security": [{"bearer": []}],
                }
            },
            "/v1/ca": {"get": _plain("The project's certificate (PEM)", {200: None})},
            "/v1/enrol": {"post": _said("Join with a one-time token", "Enrol", "Enrolled", 401)},
            "/v1/challenge": {"post": _said("Ask for a number to sign", "Challenge", "Challenge")},
            "/v1/session": {
                "post": _said("Open a session", "OpenSession", "SessionOpened", 401, 403)
            },
            "/v1/checkin": {
                "post": {
                    **_said("Ask what to do", "CheckIn", "Order", 401, 403, 409),
                    "parameters": [
                        *SEAL,
                        {
                            "name": "wait",
                            "in": "query",
                            "description": "Seconds to wait for news, 60 at most.",
                            "schema": {"type": "number", "minimum": 0, "maximum": 999999},
                        },
                    ],
                }
            },
            "/v1/blobs/{digest}": {
                "get": {
                    **_plain(
                        "A model by its SHA-256, whole or one range of bytes",
                        {
                            200: None,
                            206: None,
                            304: None,
                            401: "Problem",
                            404: "Problem",
                            416: "Problem",
                        },
                    ),
                    "parameters": [*SEAL, _path("digest", DIGEST)],
                }
            },
            "/v1/uploads": {
                "post": {
                    **_said("Offer an update", "Offer", "Verdict", 401, 403, 410, 413),
                    "parameters": SEAL,
                }
            },
            "/v1/uploads/{upload}": {
                "head": {
                    **_plain("How much has come", {200: None, 401: None, 403: None, 410: None}),
                    "parameters": [*SEAL, _path("upload", {"type": "string"})],
                },
                "patch": {
                    **_plain(
                        "Append bytes; the last ones bring the verdict",
                        {
                            200: "Verdict",
                            204: None,
                            401: "Problem",
                            403: "Problem",
                            408: "Problem",
                            409: "Problem",
                            410: "Problem",
                            413: "Problem",
                            422: "Problem",
                            423: "Problem",
                        },
                    ),
                    "parameters": [
                        *SEAL,
                        _path("upload", {"type": "string"}),
                        {
                            "name": "Upload-Offset",
                            "in": "header",
                            "required": True,
                            "schema": {"type": "string"},
                        },
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/octet-stream": {"schema": {}}},
                    },
                },
            },
            "/v1/assignments/{assignment}/fail": {
                "post": {
                    **_said(
                        "Say that an update will not come", "Failure", None, 401, 403, 404, 410
                    ),
                    "parameters": [*SEAL, _path("assignment", {"type": "string"})],
                }
            },
            **{
                f"/v1/{name}": {
                    "get": {
                        **_plain(what, {200: None, 401: "Problem", 403: "Problem"}),
                        "parameters": SEAL,
                    }
                }
                for name, what in (
                    ("status", "How the federation stands (analyst)"),
                    ("rounds", "Its latest rounds (analyst)"),
                    ("sites", "Who has joined (analyst)"),
                )
            },
            "/v1/sites/{site}/revoke": {
                "post": {
                    **_plain(
                        "Revoke a site (admin)",
                        {204: None, 401: "Problem", 403: "Problem", 404: "Problem"},
                    ),
                    "parameters": [*SEAL, _path("site", {"type": "string"})],
                }
            },
            "/v1/page": {
                "post": {
                    **_plain(
                        "A ticket for the live page (analyst)",
                        {200: None, 401: "Problem", 403: "Problem"},
                    ),
                    "parameters": SEAL,
                }
            },
            "/v1/stop": {
                "post": {
                    **_plain("Stop (admin)", {204: None, 401: "Problem", 403: "Problem"}),
                    "parameters": SEAL,
                }
            },
        },
        "components": {
            "schemas": messages.schemas(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _plain(summary: str, answers: dict[int, str | None]) -> dict[str, Any]:
    every = answers | {503: "Problem"}
    return {
        "summary": summary,
        "responses": {str(status): _answer(name) for status, name in every.items()},
    }


def _said(summary: str, body: str, answer: str | None, *refusals: int) -> dict[str, Any]:
    good: dict[int, str | None] = {200: answer} if answer else {204: None}
    if body == "Offer":
        good[201] = None
    bad: dict[int, str | None] = dict.fromkeys((400, 408, 413, 415, *refusals), "Problem")
    return {
        **_plain(summary, good | bad),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}},
        },
    }


def _answer(name: str | None) -> dict[str, Any]:
    if name is None:
        return {"description": "as said"}
    return {
        "description": name,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }


def _path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}
