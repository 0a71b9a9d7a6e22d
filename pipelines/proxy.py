"""What Serve's HTTP proxy says where the ingress cannot answer: in the one shape that all our errors have.

Serve wraps its proxy in what the function named by `CALLBACK_VARIABLE` returns.
"""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.edge import RETRY_AFTER_S
from pipelines.protocol import ApiError

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "pipelines.proxy.middleware"
# With these a client could set or lift Serve's own limits.
_CONTROLS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


class ProxyErrors:
    """ASGI middleware: takes the reins from clients; an error that is not of our API becomes its 503.

    Args:
        app: Serve's proxy.
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

        let_in = [(name, value) for name, value in scope["headers"] if name not in _CONTROLS]
        await self._app({**scope, "headers": let_in}, receive, checked)
        if not started:
            error = ApiError(503, "the server is starting anew; try again later", "unavailable")
            headers = {"retry-after": str(RETRY_AFTER_S)}
            await JSONResponse(error.body.model_dump(), error.status, headers)(scope, receive, send)


def middleware() -> list[Middleware]:
    """What Serve's proxy is wrapped in."""
    return [Middleware(ProxyErrors)]
