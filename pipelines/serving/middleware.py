"""What every request meets before and after its route: keys, size limits, errors in one shape, metrics.

Knows neither videos nor their database. `x-request-id` is Serve's: it makes one, or keeps the client's, and
answers with it.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic_core import from_json
from starlette.datastructures import FormData, Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import ApiError
from pipelines.serving.metrics import Metrics

MAX_FORM_FIELDS = 100
MAX_JSON_VALUES = 100_000  # of a few bytes each, that are a hundred in memory
BODY_WITHIN_S = 60.0  # what HAProxy has not waited for: all but the first 16 kB
CLIENT_LEFT = 499  # as nginx, Serve and others name what nobody reads any more
_METHODS = {"GET", "HEAD", "POST", "DELETE"}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
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
        self,
        request: Request,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        """Compares in constant time, and with every key; `request.state.client` is the hash from then on.

        Raises:
            ApiError: 401.
        """
        hashed = request.state.client = hash_key(given.credentials if given is not None else "")
        if not sum(hmac.compare_digest(hashed, known) for known in self._hashes):
            message = "a valid API key is needed; send it as the header `Authorization: Bearer KEY`"
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", headers=headers)


class PageCheck:
    """A dependency of the routes of a server without keys, which trusts the programs of its machine alone.

    A browser there runs pages of other sites. They may send forms to any address, and where such a site lets
    its own name point to this machine (DNS rebinding), they may read the answers.

    Args:
        allowed_origins: the pages that are let in nevertheless, as `https://studio.example`.
    """

    def __init__(self, allowed_origins: Sequence[str]) -> None:
        self._origins = {origin.lower() for origin in allowed_origins}
        self._hosts = {"localhost", *(urlsplit(origin).hostname for origin in self._origins)}

    async def __call__(self, request: Request) -> None:
        """Looks at what browsers say of the page; `X-Forwarded-Host` is anybody's to write, and not believed.

        Raises:
            ApiError: 403.
        """
        hint = "; add it to serve.allowed_origins, or use API keys, if that is wanted"
        hosts = request.headers.getlist("host")
        if foreign := next((host for host in hosts if not self._is_own(host)), None):
            message = f"this server is for programs of its own machine, not for the host name {foreign!r}"
            raise ApiError(403, f"{message}{hint} (with http:// or https:// before it)", "foreign_host")
        if request.method in _SAFE_METHODS:
            return
        origin = request.headers.get("origin")
        if origin is None:
            if request.headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return
        elif origin.lower() in self._origins or _host_of(origin) in map(str.lower, hosts):
            return
        message = f"a page of another site, {origin or 'of no origin'!r}, may not change anything here"
        raise ApiError(403, f"{message}{hint}", "foreign_origin")

    def _is_own(self, host: str) -> bool:
        """An address cannot be made to point elsewhere, as a name can."""
        match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:@\[\]]*))(?::[0-9]*)?", host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().removesuffix(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


def _host_of(origin: str) -> str:
    """Host and port of a page, in small letters; empty where nobody can tell."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def too_long(max_body_bytes: int, longest_field: str | None) -> ApiError:
    """What is said of a body of more bytes; the arguments are those of `Edge`."""
    advice = "files are not taken" if longest_field is None else f"send a smaller {longest_field}"
    message = f"the body is longer than {max_body_bytes} bytes; {advice}"
    return ApiError(413, message, "body_too_large", longest_field)


class Edge:
    """ASGI middleware: bounds the body and the time that it takes, and measures every request.

    Args:
        app: what it wraps.
        max_body_bytes: longer bodies are refused with 413.
        longest_field: the field that a body so long has; None where there is none.
        metrics: what it reports to.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, longest_field: str | None, metrics: Metrics
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._longest_field = longest_field
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BODY_WITHIN_S
        status, length, is_answered = 500, 0, False
        unsent: int | None = None  # bytes, where the answer says how long it is
        headers = Headers(scope=scope)
        unread = "content-length" in headers or "transfer-encoding" in headers

        async def bounded() -> Message:
            nonlocal length, status, unread
            try:
                async with asyncio.timeout_at(deadline if unread else None):
                    message = await receive()
            except TimeoutError:
                slow = f"the body did not arrive within {BODY_WITHIN_S:g} s; send it faster"
                raise ApiError(408, slow, "request_timeout") from None
            if message["type"] == "http.disconnect" and not is_answered:
                status = CLIENT_LEFT
            unread = message.get("more_body", False)
            length += len(message.get("body", b""))
            if length > self._max_body_bytes:
                raise too_long(self._max_body_bytes, self._longest_field)
            return message

        async def watched(message: Message) -> None:
            nonlocal status, is_answered, unsent
            if status != CLIENT_LEFT:
                status = message.get("status", status)
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                unsent = int(headers["content-length"]) if "content-length" in headers else None
                if unread:  # do not wait for the rest of the body
                    headers["connection"] = "close"
            else:
                # A client that has all bytes may leave before the answer is said to be at its end.
                unsent = None if unsent is None else unsent - len(message.get("body", b""))
                is_answered = unsent == 0 or not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, bounded, watched)
        except (asyncio.CancelledError, ClientDisconnect):  # so Serve says that the client has hung up
            status = status if is_answered else CLIENT_LEFT
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http.labels(method, route, status).observe(time.perf_counter() - begun)


def guard(
    app: FastAPI,
    routes: Sequence[BaseRoute],
    max_body_bytes: int,
    longest_field: str | None,
    metrics: Metrics,
    allowed_origins: Sequence[str],
    translations: Mapping[type[Exception], Callable[[Exception], ApiError]],
) -> None:
    """Puts `Edge` around an application of these routes, and gives all its errors one shape.

    Args:
        app: the application.
        routes: its routes, for the methods that a path allows.
        max_body_bytes: longer bodies are refused.
        longest_field: see `Edge`.
        metrics: what it reports to.
        allowed_origins: pages of these may read the answers (CORS).
        translations: what else than an `ApiError` means one.
    """

    def answer(request: Request, error: Exception) -> JSONResponse:
        translate = next((translations[kind] for kind in translations if isinstance(error, kind)), None)
        api_error = translate(error) if translate else _as_api_error(request, routes, error)
        metrics.errors.labels(api_error.body.error.code).inc()
        return JSONResponse(api_error.body.model_dump(), api_error.status, api_error.headers)

    async def nobody_reads(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["openai-poll-after-ms", "retry-after", "x-request-id"],
        )
    app.add_middleware(Edge, max_body_bytes=max_body_bytes, longest_field=longest_field, metrics=metrics)
    for kind in (ApiError, HTTPException, RequestValidationError, *translations, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, nobody_reads)


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
    return ApiError(500, "the server failed; its log says why", "internal_error")


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> str:
    """Names all methods of a path, where Starlette names those of its first route only."""
    exact = [route for route in routes if isinstance(route, Route) and route.path == request.url.path]
    found = {
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] == Match.FULL for route in exact or routes
        )
    }
    return ", ".join(sorted(found))


async def read_fields(
    request: Request, may_be_blank: Collection[str] = (), may_be_file: Collection[str] = ()
) -> Any:
    """The fields of a JSON or form body, which is as long as `Edge` lets it be.

    In a form, `physics` is JSON text, or one field for each knob, as the `openai` client writes them:
    `physics[strength][collision]`. An input that was left blank is not given.

    Args:
        request: what to read.
        may_be_blank: inputs of a form that mean something also where they are blank.
        may_be_file: inputs of a form that may be files, whose content, bytes, is their value then.

    Raises:
        ApiError: 400, 413, 415 or 422.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            # Not `request.body()`, which would be held as long as the request lasts.
            return _json_fields(b"".join([chunk async for chunk in request.stream()]))
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            limits = {"max_files": 1, "max_fields": MAX_FORM_FIELDS, "max_part_size": sys.maxsize}
            async with request.form(**limits) as form:
                return await _form_fields(form, may_be_blank, may_be_file)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    raise _unknown_type(kind)


def _unknown_type(kind: str) -> ApiError:
    message = f"content type {kind!r} is not understood here; send application/json or multipart/form-data"
    return ApiError(415, message, "unsupported_media_type")


def _json_fields(body: bytes) -> Any:
    """Reads a JSON body: one long text, such as an image, takes no more memory once read; many values do.

    Raises:
        ApiError: it has too many values.
        ValueError: it is no JSON.
    """
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ApiError(400, f"the body has more than {MAX_JSON_VALUES} values; send less", "too_many_values")
    return from_json(body, allow_inf_nan=False)


async def _form_fields(
    form: FormData, may_be_blank: Collection[str], may_be_file: Collection[str]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.items():
        if name.lstrip().startswith("{"):  # `curl -d '{"prompt": ...}'`, which curl calls a form
            raise _unknown_type("application/x-www-form-urlencoded, with JSON in it,")
        if isinstance(value, UploadFile):
            if not value.filename and not value.size:  # an input of files, none of them chosen
                continue
            if name not in may_be_file:
                raise ApiError(422, f"the field {name!r} takes no file; send text", "invalid_value", name)
            fields[name] = await value.read()
            continue
        if not value and name not in may_be_blank:
            continue
        *sections, key = re.findall(r"[^\[\]]+", name) or [name]
        target = fields
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ApiError(422, f"the field {section!r} is given twice", "invalid_value", section)
        target[key] = from_json(value, allow_inf_nan=False) if name == "physics" else value
    return fields
