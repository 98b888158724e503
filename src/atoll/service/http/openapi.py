"""The API's description (OpenAPI 3.1), derived from the application's routes and the messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from atoll.protocol import messages

#: What a status brings: a message, one of several, or something else (bytes, text, nothing).
Content = type[messages.Message] | tuple[type[messages.Message], ...] | None
Answers = Mapping[int, Content]
Parameter = dict[str, Any]

TEXT = {"type": "string"}
SEAL: list[Parameter] = [
    {"name": "Atoll-Session", "in": "header", "required": True, "schema": TEXT},
    {
        "name": "Atoll-Counter", "in": "header", "required": True,
        "description": "Taken once in a session, in any order within the last 64.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
    },
    {
        "name": "Atoll-Seal", "in": "header", "required": True,
        "description": "HMAC-SHA256 (hex) with the session's key over method, target, counter and "
        "the SHA-256 (hex) of the body, each on a line. For PATCH, 'offset:length' stands "
        "for the body, which the offer's SHA-256 binds.",
        "schema": TEXT,
    },
]  # fmt: skip
WAIT: Parameter = {
    "name": "wait", "in": "query", "description": "Seconds to wait for news, 60 at most.",
    "schema": {"type": "number", "minimum": 0, "maximum": 999999},
}  # fmt: skip
SINCE: Parameter = {
    "name": "since", "in": "query", "description": "The last round that is known already.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999999999},
}  # fmt: skip
OFFSET: Parameter = {"name": "Upload-Offset", "in": "header", "required": True, "schema": TEXT}
PATHS = {"digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"}}


class Described(Route):
    """A route with what it is for, what it takes and what it answers.

    Args:
        answers: what a status brings, where that is not the reason of a refusal.
        refusals: statuses, besides those that any request of its kind may meet.
        body: the message it brings, or `bytes`.
        sealed: whether it is made in a session.
        parameters: in the query or a header.
    """

    def __init__(
        self, method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]],
        summary: str, answers: Answers, *refusals: int,
        body: type[messages.Message] | type[bytes] | None = None, sealed: bool = True,
        parameters: Iterable[Parameter] = (),
    ) -> None:  # fmt: skip
        super().__init__(path, endpoint, methods=[method])
        self.method, self.summary, self.answers, self.body = method, summary, answers, body
        self.refusals, self.sealed, self.parameters = refusals, sealed, tuple(parameters)

    def operation(self) -> dict[str, Any]:
        """Its part of the description."""
        refusals = {*self.refusals, 503, 507}
        if self.sealed:
            refusals |= {401, 403, 409}
        if self.method not in ("GET", "HEAD"):
            refusals |= {408, 413, 415}
        if self.body not in (None, bytes):
            refusals.add(400)
        # A HEAD is answered without a body.
        problem = None if self.method == "HEAD" else messages.Problem
        answers: dict[int, Content] = {**dict.fromkeys(refusals, problem), **self.answers}
        found: dict[str, Any] = {
            "summary": self.summary,
            "parameters": [
                *(SEAL if self.sealed else ()),
                *(
                    {"name": name, "in": "path", "required": True, "schema": PATHS.get(name, TEXT)}
                    for name in self.param_convertors
                ),
                *self.parameters,
            ],
            "responses": {str(status): _answer(answers[status]) for status in sorted(answers)},
        }
        if self.body is bytes:
            content: dict[str, Any] = {"application/octet-stream": {"schema": {}}}
            found["requestBody"] = {"required": True, "content": content}
        elif self.body is not None:
            found["requestBody"] = {"required": True, "content": _json(self.body)}
        return found


def description(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Described):
            paths.setdefault(route.path, {})[route.method.lower()] = route.operation()
    paths["/metrics"]["get"]["security"] = [{"bearer": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "atoll federation",
            "version": "1",
            "description": "Sites dial out to one port, over TLS 1.3. Control messages are JSON of "
            "closed schemas; tensors are raw bodies in the safetensors layout.",
        },
        "paths": paths,
        "components": {
            "schemas": messages.schemas(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answer(content: Content) -> dict[str, Any]:
    if content is None:
        return {"description": "as said"}
    some = content if isinstance(content, tuple) else (content,)
    return {"description": " or ".join(one.__name__ for one in some), "content": _json(*some)}


def _json(*some: type[Any]) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{one.__name__}"} for one in some]
    return {"application/json": {"schema": schemas[0] if len(some) == 1 else {"anyOf": schemas}}}
