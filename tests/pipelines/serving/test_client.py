"""`prophy request` and `prophy key` against a real server."""

import _thread
import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from PIL import Image

from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from pipelines.serving import client
from pipelines.serving.dispatcher import GenerationStep
from pipelines.serving.middleware import hash_key
from pipelines.serving.protocol import VideoRequest
from prophy.errors import ProPhyError
from tests.conftest import tiny_config
from tests.pipelines.serving.test_dispatcher import RESULT
from tests.pipelines.test_cli import CommandLine
from tests.servers import PROMPT, http_server

KEY = "prophy-key-of-a-test"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Makes any video at once, but none from a prompt with `broken` in it, and never an `endless` one."""

    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        yield GenerationStep(0.5)
        if "endless" in spec.prompt:
            await asyncio.Event().wait()
        if "broken" in spec.prompt:
            raise ProPhyError("no such thing")
        of_image = {VIDEO_FILE: b"mp4 of " + image} if image else {}
        yield GenerationStep(1.0, RESULT._replace(files=RESULT.files | of_image))

    config = tiny_config(tmp_path_factory.mktemp("client"), f"serve.api_keys=[{hash_key(KEY)}]")
    with http_server(config, generate) as url:
        yield url


@pytest.fixture
def prophy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.setenv("PROPHY_API_KEY", KEY)
    return CommandLine(monkeypatch, capsys)


def test_request(prophy: CommandLine, url: str, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "ball.mp4"
    fields = ("-f", "seconds=1", "-f", "seed=3", "--field", "size=32x32")
    code, _, shown = prophy("request", PROMPT, "--out", str(out), "--url", url, *fields)
    assert code == 0 and out.read_bytes() == b"mp4"
    assert "completed" in shown and "100 %" in shown
    headers = {"authorization": f"Bearer {KEY}"}
    (video,) = httpx.get(f"{url}/v1/videos", params={"limit": 1}, headers=headers).json()["data"]
    assert (video["prompt"], video["seed"], video["seconds"], video["size"]) == (PROMPT, 3, "1.125", "32x32")


def test_an_image_goes_to_the_server(prophy: CommandLine, url: str, tmp_path: Path) -> None:
    image, out = tmp_path / "a.png", tmp_path / "a.mp4"
    asked = ("request", PROMPT, "--out", str(out), "--url", url, "--image", str(image))
    assert f"cannot read the image {image}: No such file or directory" in prophy.mistake(*asked)
    image.write_bytes(b"png")
    knobs = ("-f", "seconds=1", "-f", "seed=3", "-f", "physics.strength.collision=2")
    assert "the server refuses: the image is no image that can be read" in prophy.mistake(*asked, *knobs)
    Image.new("RGB", (8, 8), "red").save(image)
    code, _, _ = prophy(*asked, *knobs)
    assert code == 0 and out.read_bytes() == b"mp4 of " + image.read_bytes()
    headers = {"authorization": f"Bearer {KEY}"}
    (video,) = httpx.get(f"{url}/v1/videos", params={"limit": 1}, headers=headers).json()["data"]
    assert (video["seed"], video["physics"]["strength"]) == (3, {"collision": 2})


def test_mistakes(prophy: CommandLine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(prompt: str, *arguments: str) -> str:
        return prophy.mistake("request", prompt, "--out", str(tmp_path / "ball.mp4"), *arguments)

    assert "did you mean 'seed'?" in mistake(PROMPT, "--url", url, "-f", "sead=3")
    assert "no such thing" in mistake("a broken glass", "--url", url)
    assert "`prophy serve` running" in mistake(PROMPT, "--url", "http://127.0.0.1:1")
    assert "`prophy serve` running" in mistake(PROMPT, "--url", "nowhere")
    (tmp_path / "file").touch()
    arguments = ("--url", url, "-f", "num_inference_steps=1")
    sentence = prophy.mistake("request", PROMPT, "--out", str(tmp_path / "file" / "x.mp4"), *arguments)
    assert "cannot write" in sentence and f"{url}/v1/videos/video_" in sentence
    monkeypatch.setenv("PROPHY_API_KEY", "wrong")
    assert "a valid API key is needed" in mistake(PROMPT, "--url", url)


def test_texts_arrive_as_they_were_typed(prophy: CommandLine, url: str, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    for text in ("blurry: low, text: none", "@x", "'q", "[low", "blurry # ugly", "", "12:30", "no", "${x}"):
        out = ("--out", str(tmp_path / "x.mp4"))
        code, _, shown = prophy("request", PROMPT, *out, "--url", url, "-f", f"negative_prompt={text}")
        assert code == 0, shown
        (video,) = httpx.get(f"{url}/v1/videos", params={"limit": 1}, headers=headers).json()["data"]
        assert video["negative_prompt"] == text


def test_all_texts_of_the_api_are_known() -> None:
    texts = {name for name, field in VideoRequest.model_fields.items() if field.annotation is str}
    texts |= {name for name, field in VideoRequest.model_fields.items() if str in get_args(field.annotation)}
    assert texts == client.TEXTS


@pytest.mark.parametrize(
    "field",
    ["seed", "seed=[low", "seed=@x", "seed='q", "physics=a: b: c", "guidance_scale=.nan", "fps=!!set {a}"],
)
def test_fields_that_are_none(prophy: CommandLine, tmp_path: Path, field: str) -> None:
    mistake = prophy.mistake("request", PROMPT, "--out", str(tmp_path / "x.mp4"), "-f", field)
    assert "bad --field" in mistake and "give NAME=VALUE" in mistake


@pytest.mark.parametrize(
    ("variables", "arguments", "sentence"),
    [
        ({"ALL_PROXY": "gopher://127.0.0.1:1"}, [], "cannot use the proxy of the environment"),
        ({}, ["--url", "http://localhost:80o0"], "--url http://localhost:80o0 is no URL"),
        ({}, ["--url", "http://[::1"], "--url http://[::1 is no URL"),
        (
            {"PROPHY_API_KEY": "\N{LEFT DOUBLE QUOTATION MARK}key"},
            [],
            "the API key has characters that no key",
        ),
        ({"PROPHY_API_KEY": "key\n"}, [], "the API key has characters that no key has"),
        ({}, ["-f", "negative_prompt=no \udcff"], "the field 'negative_prompt' has bytes that are no UTF-8"),
    ],
)
def test_what_no_server_is_asked_for(
    prophy: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: list[str],
    sentence: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sentence in prophy.mistake("request", PROMPT, "--out", str(tmp_path / "x.mp4"), *arguments)


@contextmanager
def answering(*answers: Any) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that gives these answers in turn: JSON, bytes, or None to hang up; the last again and again.

    Yields:
        Its URL, and method and idempotency key of each request so far.
    """
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append((self.command, self.headers["idempotency-key"]))
            self.rfile.read(int(self.headers.get("content-length", 0)))
            if answer is None:
                return
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("openai-poll-after-ms", "0")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


QUEUED = {"id": "video_1", "status": "queued", "progress": 0, "error": None}
DONE = QUEUED | {"status": "completed", "progress": 100}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are sent again without a pause, and not for long."""
    monkeypatch.setattr(client, "RETRY_S", 0.0)
    monkeypatch.setattr(client, "PATIENCE_S", 0.2)


def test_a_request_without_an_answer_is_sent_again_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY_S", 0.0)
    with answering(None, None, QUEUED, None, DONE, None, b"mp4") as (url, asked):
        out = client.run(url, PROMPT, tmp_path / "x.mp4", [])
    assert out.read_bytes() == b"mp4"
    assert [method for method, _ in asked] == ["POST"] * 3 + ["GET"] * 4
    keys = [key for _, key in asked]
    assert len(set(keys[:3])) == 1 and keys[0] and keys[3:] == [None] * 4


@pytest.mark.parametrize("answers", [(QUEUED, None), (QUEUED, DONE, None)], ids=["watched", "fetched"])
def test_a_server_that_goes_away_leaves_the_video_to_be_found(
    tmp_path: Path, impatient: None, answers: tuple[Any, ...]
) -> None:
    with answering(*answers) as (url, _), pytest.raises(ProPhyError) as error:
        client.run(url, PROMPT, tmp_path / "x.mp4", [])
    where = (
        f"video video_1 was accepted, and is at {url}/v1/videos/video_1/content once it is made, but there is"
    )
    assert where in str(error.value)


@pytest.mark.parametrize("answer", [b"<html>", [], {}, {"id": "x"}])
def test_a_server_of_something_else(tmp_path: Path, answer: Any) -> None:
    with answering(answer) as (url, _), pytest.raises(ProPhyError, match="is no Videos API; is --url that"):
        client.run(url, PROMPT, tmp_path / "x.mp4", [])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises here, also where the shell that started the tests ignores it, as for a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_cancels_the_video(url: str, tmp_path: Path, interruptible: None) -> None:
    headers = {"authorization": f"Bearer {KEY}"}

    def interrupt() -> None:
        while not [video for video in listed() if video["status"] == "in_progress"]:
            time.sleep(0.02)
        _thread.interrupt_main()

    def listed() -> list[dict[str, str]]:
        return httpx.get(f"{url}/v1/videos", headers=headers).json()["data"]

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(ProPhyError, match=r"video_[0-9a-f]{32} is cancelled"):
        client.run(url, "an endless video", tmp_path / "x.mp4", [], KEY)
    assert "an endless video" not in [video["prompt"] for video in listed()]


def test_key(prophy: CommandLine) -> None:
    _, shown, _ = prophy("key")
    made, hashed = re.fullmatch(r"key:  (prophy-\S{43})\nhash: ([0-9a-f]{64})\n", shown).groups()
    assert hash_key(made) == hashed
