"""What the Videos API refuses over real HTTP, with the real model behind it: fields, bodies, pages, keys."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from pipelines.config import Config
from pipelines.generation.limits import shape_limits
from pipelines.serving.errors import ApiError
from pipelines.serving.metrics import Metrics
from pipelines.serving.middleware import Edge, hash_key, new_key
from pipelines.serving.protocol import VideoRequest
from pipelines.serving.replica import VideoGenerator
from prophy.errors import ProPhyError
from tests.conftest import tiny_config
from tests.servers import (
    LIMITS,
    PROMPT,
    SHORT,
    check_error,
    http_server,
    serve_config,
    until,
    wait,
)

FOREIGN, ADDRESS = "http://evil.example", "127.0.0.1:8000"


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        ({}, "missing_parameter", "prompt", "the field 'prompt' is missing"),
        ({"prompt": " "}, "invalid_value", "prompt", "bad value ' ' for the field 'prompt'"),
        ({"prompt": "x" * 100_000}, "invalid_value", "prompt", "at most 32000 characters"),
        ({"promt": "x"}, "unknown_parameter", "promt", "did you mean 'prompt'?"),
        ({"prompt": "x", "n": 1}, "unknown_parameter", "n", "unknown field 'n'; there are prompt, model, "),
        ({"prompt": "x", "seconds": 2}, "invalid_value", "seconds", "give it as text, such as '2'"),
        ({"prompt": "x", "seconds": "4s"}, "invalid_value", "seconds", "'4s'"),
        ({"prompt": "x", "seconds": "0.0"}, "invalid_value", "seconds", "has no frame"),
        (
            {"prompt": "x", "seed": 2**53},
            "invalid_value",
            "seed",
            "less than or equal to 9007199254740991",
        ),
        (
            {"prompt": "x", "seconds": "3"},
            "invalid_value",
            "seconds",
            "25 frames; this model makes at most 17",
        ),
        ({"prompt": "x", "size": "big"}, "invalid_value", "size", "'big'"),
        ({"prompt": "x", "size": "40x32"}, "invalid_value", "size", "a width that is a multiple of 16"),
        ({"prompt": "x", "size": "128x128"}, "invalid_value", "size", "at most 4096"),
        ({"prompt": "x", "num_inference_steps": 0}, "invalid_value", "num_inference_steps", "greater than"),
        ({"prompt": "x", "seed": -1}, "invalid_value", "seed", "greater than"),
        ({"prompt": "x", "seed": True}, "invalid_value", "seed", "a number is needed"),
        ({"prompt": "x", "fps": 1e-300}, "invalid_value", "fps", "greater than"),
        ({"prompt": "x", "physics": {"sclae": 1}}, "unknown_parameter", "physics.sclae", "'physics.scale'"),
        (
            {"prompt": "x", "physics": {"strength": {"colision": 1}}},
            "invalid_value",
            "physics.strength.colision",
            "did you mean 'collision'?",
        ),
        (
            {"prompt": "x", "physics": {"strength": {"gas motion": 1, "Gas_Motion": 2}}},
            "invalid_value",
            "physics.strength.Gas_Motion",
            "'gas motion' and 'Gas_Motion' are one phenomenon; give it one strength",
        ),
        (
            {"prompt": "x", "physics": {"scale": 0, "return_maps": True}},
            "invalid_value",
            "physics",
            "return_maps needs the Physical Branch",
        ),
        ([1], "invalid_value", None, "[1]"),
    ],
)
def test_bad_fields(client: httpx.Client, fields: Any, code: str, param: str | None, message: str) -> None:
    assert message in check_error(client.post("/v1/videos", json=fields), 422, code, param)


@pytest.mark.parametrize(
    "body",
    ["{", '{"prompt": "\\ud800"}', "[" * 100_000, '{"prompt": "x", "fps": NaN}', b"\xff\xfe", "1" * 100_000],
    ids=["cut", "surrogate", "deep", "nan", "bytes", "huge number"],
)
def test_bodies_that_are_not_json(client: httpx.Client, body: str | bytes) -> None:
    response = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["message"]


def test_bad_requests(client: httpx.Client) -> None:
    check_error(
        client.post("/v1/videos", json={"prompt": "x", "model": "sora-2"}), 404, "model_not_found", "model"
    )
    check_error(client.post("/v1/videos", content="prompt"), 415, "unsupported_media_type")
    shell = {"content-type": "application/x-www-form-urlencoded"}  # what curl says of its -d
    json_as_form = client.post("/v1/videos", content='{"prompt": "a=b&c"}', headers=shell)
    assert "send application/json" in check_error(json_as_form, 415, "unsupported_media_type")
    check_error(client.get("/v1/pictures"), 404, "not_found")
    wrong_method = client.put("/v1/videos")
    check_error(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "GET, POST"
    check_error(client.get("/v1/videos", params={"limit": 0}), 422, "invalid_value", "limit")
    form = {"prompt": "x", "physics": '{"scale": 11}'}
    check_error(client.post("/v1/videos", data=form), 422, "invalid_value", "physics.scale")
    twice = {"prompt": "x", "prompt[a]": "y"}
    check_error(client.post("/v1/videos", data=twice), 422, "invalid_value", "prompt")
    many = {f"field{index}": "" for index in range(1000)}
    check_error(client.post("/v1/videos", data=many), 400, "bad_request")


@pytest.fixture(scope="module")
def of_text(
    config: Config, generator: VideoGenerator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A client of a server whose model makes videos of text alone."""
    own = config.serve.model_copy(update={"output": tmp_path_factory.mktemp("text")})
    limits = LIMITS.model_copy(update={"images": "never"})
    serving = http_server(config.model_copy(update={"serve": own}), generator.generate, limits=limits)
    with serving as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
def test_an_image_is_refused_unseen_where_none_is_taken(
    of_text: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else of the request is looked at; the server runs in this process."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("somebody looks at it"))
    answers = [
        of_text.post(
            path, data={"seed": "-1"}, files={"input_reference": ("../../a.png\x00.exe", content, kind)}
        )
        for content in (b"", b"png", bytes(500_000))
        for kind in ("image/png", "text/plain", "application/json")
    ]
    for url in ("data:image/png;base64,iVBORw==", "data:,", "http://localhost/a.png", "file:///etc/passwd"):
        answers.append(of_text.post(path, json={"input_reference": {"image_url": url}}))
        answers.append(of_text.post(path, data={"input_reference[image_url]": url}))
    wrong: tuple[Any, ...] = ({}, {"file_id": "file-1"}, "a.png", [], 0, False, {"a": [{}] * 1000})
    for reference in wrong:
        answers.append(of_text.post(path, json={"prompt": PROMPT, "input_reference": reference}))
    for answer in answers:
        message = check_error(answer, 422, "unsupported_parameter", "input_reference")
        assert message == "this model makes videos from text alone and takes no image; leave it out"


def test_an_image_where_none_is_taken_gives_a_body_no_more_length(of_text: httpx.Client) -> None:
    large = of_text.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": bytes(1 << 20)})
    assert "files are not taken" in check_error(large, 413, "body_too_large")
    body = json.dumps({"prompt": "x", "padding": "x" * (1 << 20)})
    long = of_text.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    check_error(long, 413, "body_too_large")


def test_openais_client_learns_that_no_image_is_taken(of_text: httpx.Client) -> None:
    maker = openai.OpenAI(base_url=f"{of_text.base_url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError, match="takes no image"):
        maker.videos.create(prompt=PROMPT, input_reference=b"png")
    reference = {"image_url": "data:image/png;base64,iVBORw=="}
    with pytest.raises(openai.UnprocessableEntityError, match="takes no image"):
        maker.videos.create(prompt=PROMPT, extra_body={"input_reference": reference})


def test_a_form_whose_inputs_were_left_blank(client: httpx.Client) -> None:
    blank = {"seconds": (None, ""), "seed": (None, ""), "negative_prompt": (None, "")}
    chosen = {"prompt": (None, PROMPT), "num_inference_steps": (None, "1")}
    video = client.post("/v1/videos", files=blank | chosen | {"input_reference": ("", b"")}).json()
    assert (video["num_frames"], video["negative_prompt"]) == (5, "")
    wait(client, video["id"])
    missing = client.post("/v1/videos", files=blank | {"prompt": (None, "")})
    check_error(missing, 422, "missing_parameter", "prompt")


@pytest.mark.parametrize(
    ("method", "headers", "code"),
    [
        ("GET", {"host": "evil.example"}, "foreign_host"),
        ("GET", {"host": "127.0.0.1.evil.example:8000"}, "foreign_host"),
        ("GET", {"host": "localhost.evil.example", "x-forwarded-host": "localhost"}, "foreign_host"),
        ("GET", {"host": "evil.example@localhost"}, "foreign_host"),
        ("GET", {"host": "[::1].evil.example"}, "foreign_host"),
        ("POST", {"host": "evil.example", "origin": FOREIGN}, "foreign_host"),
        ("POST", {"host": ADDRESS, "origin": FOREIGN}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "origin": "null"}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "origin": "http://["}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "origin": "http://127.0.0.1:3000"}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "origin": FOREIGN, "x-forwarded-host": "evil.example"}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "sec-fetch-site": "cross-site"}, "foreign_origin"),
        ("POST", {"host": ADDRESS, "sec-fetch-site": "same-site"}, "foreign_origin"),
        ("DELETE", {"host": ADDRESS, "origin": FOREIGN}, "foreign_origin"),
        ("GET", {"host": "localhost"}, None),
        ("GET", {"host": "LocalHost.:8000", "origin": FOREIGN, "sec-fetch-site": "cross-site"}, None),
        ("GET", {"host": "[::1]:8000"}, None),
        ("GET", {"host": "10.1.2.3"}, None),
        ("POST", {"host": "LOCALHOST:8000", "origin": "http://localhost:8000"}, None),
        ("POST", {"host": ADDRESS, "sec-fetch-site": "same-origin"}, None),
        ("GET", {"host": "studio.example"}, None),
        ("POST", {"host": ADDRESS, "origin": "https://Studio.example", "sec-fetch-site": "cross-site"}, None),
    ],
)
def test_pages_of_other_sites(
    client: httpx.Client, method: str, headers: dict[str, str], code: str | None
) -> None:
    """Without keys; the fixture allows `https://studio.example`. What is let in is refused for its body."""
    path = "/v1/videos" if method != "DELETE" else "/v1/videos/video_x"
    answer = client.request(method, path, headers=headers)
    if code is not None:
        assert "serve.allowed_origins" in check_error(answer, 403, code)
    else:
        assert answer.status_code == {"GET": 200, "POST": 415}[method], answer.text


@pytest.mark.parametrize(
    "origin", ["http://[", "https://:80", "https://a:port", "https://a?b", "https://a#", "studio.example"]
)
def test_an_allowed_page_has_a_host(tmp_path: Path, origin: str) -> None:
    with pytest.raises(ProPhyError, match=r"bad value for 'serve\.allowed_origins\.0' on the command line"):
        tiny_config(tmp_path, f"serve.allowed_origins=['{origin}']")


def test_an_allowed_page_may_read(client: httpx.Client) -> None:
    origin = "https://studio.example"
    asked = {"origin": origin, "access-control-request-method": "DELETE"}
    preflight = client.options("/v1/videos/video_x", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    error = client.get("/v1/videos/video_x", headers={"origin": origin})
    check_error(error, 404, "video_not_found")
    assert error.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-origin" not in client.get("/v1/videos", headers={"origin": FOREIGN}).headers


def test_a_client_that_leaves_in_mid_body_is_no_error(client: httpx.Client) -> None:
    before = client.get("/metrics").text
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n")
        connection.sendall(b"content-type: application/json\r\n\r\n{")
    left = 'prophy_http_request_seconds_count{method="POST",route="/v1/videos",status="499"} 1.0'
    until(lambda: left in client.get("/metrics").text, "its leaving is counted")
    metrics = client.get("/metrics").text
    errors = [line for line in before.splitlines() if "internal_error" in line or 'status="500"' in line]
    assert errors == [
        line for line in metrics.splitlines() if "internal_error" in line or 'status="500"' in line
    ]


def test_a_client_that_has_all_bytes_has_not_left() -> None:
    """Also where it hangs up before the server has found that there are no more; one without all has left."""
    metrics = Metrics()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": bytes(scope["sent"]), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    for sent in (1, 2):
        scope: Scope = {"type": "http", "method": "GET", "headers": [], "sent": sent}
        asyncio.run(Edge(app, 10, None, metrics)(scope, receive, send))
    counted = metrics.render({}, 0).decode()
    for status in ("200", "499"):
        sample = f'prophy_http_request_seconds_count{{method="GET",route="none",status="{status}"}} 1.0'
        assert sample in counted


@pytest.mark.parametrize(
    "video_id",
    ["video_x", "video_" + "0" * 32, "..%2F..%2Fjobs.sqlite", "a%00b", "a%0d%0aset-cookie:b", "x" * 10_000],
)
def test_unknown_ids(client: httpx.Client, video_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/physics"), ("DELETE", "")):
        response = client.request(method, f"/v1/videos/{video_id}{path}")
        assert "set-cookie" not in response.headers
        assert check_error(response, 404, response.json()["error"]["code"])


def test_huge_bodies_are_not_read(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    for kind in ("application/json", "multipart/form-data; boundary=x"):
        try:
            response = client.post("/v1/videos", content=endless(), headers={"content-type": kind})
            assert response.status_code in (400, 413), response.text
        except httpx.WriteError:  # the server has hung up
            pass
        assert sent < 1 << 29
        sent = 0


def test_api_keys(config: Config, generator: VideoGenerator, tmp_path: Path) -> None:
    key = new_key()
    keyed = serve_config(
        tmp_path, Path(config.checkpoint), f"serve.api_keys=[{hash_key('another')},{hash_key(key)}]"
    )
    with http_server(keyed, generator.generate) as url, httpx.Client(base_url=url) as client:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {key}"}):
            for path in ("/v1/videos", "/v1/models", "/metrics"):
                answer = client.get(path, headers=given)
                check_error(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
            check_error(client.post("/v1/videos", json=SHORT, headers=given), 401, "invalid_api_key")
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id == "prophy-tiny"
    saved = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert key not in saved


def test_bare_backbone_has_no_knobs(config: Config) -> None:
    bare = config.model_copy(update={"checkpoint": None})
    request = VideoRequest.parse({"prompt": PROMPT, "physics": {"scale": 0.5}}, bare, shape_limits(bare))
    with pytest.raises(ApiError, match="bare backbone"):
        request.to_spec(bare, shape_limits(bare))
