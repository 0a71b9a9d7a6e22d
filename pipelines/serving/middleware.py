"""What every request meets before and after its route: keys, size limits, errors in one shape, metrics.

Knows no videos. `x-request-id` is Serve's: it makes one, or keeps the client's, and answers with it.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic_core import from_json
from starlette.datastructures import FormData, Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.jobs import UNANSWERED
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ApiError

RETRY_AFTER_S = 10
MAX_FORM_FIELDS = 100
_METHODS = {"GET", "HEAD", "POST", "DELETE"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def new_key() -> str:
    """A key for a client; only its hash goes into the configuration."""
    return f"prophy-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. A key is 32 random bytes, so that no slower hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyCheck:
    """A dependency of routes that lets in who has one of the keys.

    Args:
        hashes: SHA-256 of each key.
    """

    def __init__(self, hashes: list[str]) -> None:
        self._hashes = hashes

    async def __call__(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        """Compares in constant time, and with every key.

        Raises:
            ApiError: 401.
        """
        hashed = hash_key(given.credentials if given is not None else "")
        if not sum(hmac.compare_digest(hashed, known) for known in self._hashes):
            message = "a valid API key is needed; send it as the header `Authorization: Bearer KEY`"
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", headers=headers)


class Edge:
    """ASGI middleware: bounds the body, and measures every request.

    Args:
        app: what it wraps.
        max_body_bytes: longer bodies are refused with 413.
        metrics: what it reports to.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status, length = 500, 0
        headers = Headers(scope=scope)
        unread = "content-length" in headers or "transfer-encoding" in headers

        async def bounded() -> Message:
            nonlocal length, unread
            message = await receive()
            unread = message.get("more_body", False)
            length += len(message.get("body", b""))
            if length > self._max_body_bytes:
                raise ApiError(413, f"the body is longer than {self._max_body_bytes} bytes", "body_too_large")
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start" and unread:  # do not wait for the rest of the body
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, bounded, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http.labels(method, route, status).observe(time.perf_counter() - begun)


def guard(app: FastAPI, routes: Sequence[BaseRoute], max_body_bytes: int, metrics: Metrics) -> None:
    """Puts `Edge` around an application of these routes, and gives all its errors one shape."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        api_error = _as_api_error(request, routes, error)
        metrics.errors.labels(api_error.body.error.code).inc()
        return JSONResponse(api_error.body.model_dump(), api_error.status, api_error.headers)

    app.add_middleware(Edge, max_body_bytes=max_body_bytes, metrics=metrics)
    for kind in (ApiError, HTTPException, RequestValidationError, *UNANSWERED, Exception):
        app.add_exception_handler(kind, answer)


def _as_api_error(request: Request, routes: Sequence[BaseRoute], error: Exception) -> ApiError:
    """The error in the API's shape. Clients learn nothing of a bug; the server's log has the traceback."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=status, detail=detail):  # an unknown path or method, a broken form
            message = f"{request.method} {request.url.path}: {detail}"
            headers = {"allow": _allowed(request, routes)} if status == 405 else error.headers
            return ApiError(status, message, _HTTP_CODES.get(status, "bad_request"), headers=headers)
        case RequestValidationError():
            first = error.errors()[0]
            param = str(first["loc"][-1])
            return ApiError(422, f"bad value for {param!r}: {first['msg']}", "invalid_value", param)
        case _ if isinstance(error, UNANSWERED):
            headers = {"retry-after": str(RETRY_AFTER_S)}
            message = "the job database does not answer; try again later"
            return ApiError(503, message, "database_unavailable", headers=headers)
    return ApiError(500, "the server failed; its log says why", "internal_error")


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> str:
    """All methods of a path, where Starlette names those of its first route only."""
    exact = [route for route in routes if isinstance(route, Route) and route.path == request.url.path]
    found = {
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] == Match.FULL for route in exact or routes
        )
    }
    return ", ".join(sorted(found))


async def read_fields(request: Request) -> Any:
    """The fields of a JSON or form body.

    In a form, `physics` is JSON text, or one field for each knob, as the `openai` client writes them:
    `physics[strength][collision]`.

    Raises:
        ApiError: 400, 413, 415 or 422.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return from_json(await request.body(), allow_inf_nan=False)
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
                return _form_fields(form)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    message = f"content type {kind!r} is not understood; send application/json or multipart/form-data"
    raise ApiError(415, message, "unsupported_media_type")


def _form_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.items():
        if isinstance(value, UploadFile):
            message = f"this model makes videos from text only; leave out the file {name!r}"
            raise ApiError(422, message, "unsupported_parameter", name)
        *sections, key = re.findall(r"[^\[\]]+", name) or [name]
        target = fields
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ApiError(422, f"the field {section!r} is given twice", "invalid_value", section)
        target[key] = from_json(value, allow_inf_nan=False) if name == "physics" else value
    return fields
