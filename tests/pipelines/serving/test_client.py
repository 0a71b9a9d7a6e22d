"""`prophy request` and `prophy key` against a real server."""

import _thread
import asyncio
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from pipelines.serving import client
from pipelines.serving.dispatcher import GenerationStep
from pipelines.serving.middleware import hash_key
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
