"""What tests of the endpoint share: a model with knobs that are seen, a server without Ray, and patience."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from pipelines.config import Config
from pipelines.generation.spec import ShapeLimits, VideoSpec
from pipelines.serving import drawing
from pipelines.serving.api import create_app
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.dispatcher import Dispatcher, GenerationStep
from pipelines.serving.jobs import JobStore
from pipelines.serving.metrics import Metrics
from pipelines.serving.service import GeneratorStatus, VideoService
from tests.conftest import tiny_config
from tests.wisa import PHENOMENA

PROMPT = "a red ball falls and bounces"
LONG = {"prompt": PROMPT, "num_inference_steps": 200, "size": "64x64", "seconds": "2"}
SHORT = {"prompt": PROMPT, "num_inference_steps": 1, "seed": 0}
PATIENCE_S = 240

LIMITS = ShapeLimits(
    images="first_latent",
    frame_multiple=4,
    height_multiple=16,
    width_multiple=16,
    token_height=8,
    token_width=8,
    sequence_parallel=1,
    max_num_frames=17,
    max_pixels=4096,
    phenomena=PHENOMENA,
)
"""What the tiny model can make."""

Generate = Callable[[VideoSpec, bytes | None], AsyncGenerator[GenerationStep, None]]


def save_checkpoint(folder: Path, family: str = "wan", pretrained: str = "tiny") -> Path:
    """A branch whose injections are not zero, so that its knobs are seen in the video."""
    import torch  # takes seconds, and servers whose videos are stand-ins do without

    from prophy.backbones.families import FAMILIES
    from prophy.backbones.loading import load_pipeline
    from prophy.backbones.pretrained import fingerprint
    from prophy.models.checkpoint import save_branch

    backbone = load_pipeline(family, pretrained, None, torch.float32, None).transformer
    torch.manual_seed(0)
    transformer = (
        FAMILIES[family]
        .classes()
        .prophy_transformer.from_transformer(
            backbone, {"physics_layers": [0, 2], "latent_shape": [5, 16, 16], "phenomena": [*PHENOMENA]}
        )
    )
    with torch.no_grad():
        for parameter in transformer.physics_branch.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained_on = {"name": pretrained, "revision": None, "fingerprint": fingerprint(pretrained, None)}
    save_branch(transformer, folder, trained_on)
    return folder


def serve_config(folder: Path, checkpoint: Path, *overrides: str) -> Config:
    """Clips of 5 frames of 32 pixels in 2 steps, if a request asks for nothing else."""
    return tiny_config(
        folder,
        f"checkpoint={checkpoint}",
        "backbone.num_frames=5",
        "backbone.height=32",
        "backbone.width=32",
        "sampling.num_inference_steps=2",
        "serve.port=0",
        "serve.max_replicas=1",
        "serve.max_queued=3",
        "serve.max_pixels=4096",
        "serve.max_num_frames=17",
        *overrides,
    )


@contextmanager
def http_server(
    config: Config, generate: Generate, *, is_ready: bool = True, limits: ShapeLimits = LIMITS
) -> Iterator[str]:
    """The API over real HTTP without Ray: videos are made by `generate`, in this process. Yields its URL."""
    metrics, settings = Metrics(), config.serve
    settings.output.mkdir(parents=True, exist_ok=True)
    store, artefacts = JobStore(settings.database_url), ArtefactStore(settings.videos_location)

    async def generator_status() -> GeneratorStatus:
        return GeneratorStatus(is_ready, num_replicas=1)

    def draw(kind: str, *of: Any) -> bytes:
        return getattr(drawing, kind)(*of)

    service = VideoService(
        config,
        limits,
        store,
        artefacts,
        Dispatcher(store, artefacts, generate, metrics, settings),
        metrics,
        generator_status,
        lambda kind, *of: asyncio.to_thread(draw, kind, *of),
    )
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "the server has started")
        assert server.started, "the server has ended"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(happened: Callable[[], bool], what: str) -> None:
    """Waits until something has happened, within `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"it is not true after {PATIENCE_S} s that {what}"
        time.sleep(0.02)


def poll(client: httpx.Client, video_id: str) -> Iterator[dict[str, Any]]:
    """What a client sees of a video until it is completed."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        video = client.get(f"/v1/videos/{video_id}").raise_for_status().json()
        assert video["status"] != "failed", video["error"]
        yield video
        if video["status"] == "completed":
            return
        time.sleep(0.02)
    raise TimeoutError(video)


def wait(client: httpx.Client, video_id: str, progress: int = 100) -> dict[str, Any]:
    """The video as it is once it has come this far."""
    return next(video for video in poll(client, video_id) if video["progress"] >= progress)


def submit(client: httpx.Client, **fields: Any) -> str:
    """The id of a new video."""
    response = client.post("/v1/videos", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["id"]


def make(client: httpx.Client, **fields: Any) -> bytes:
    """The mp4 of a short video."""
    video_id = submit(client, **(SHORT | fields))
    wait(client, video_id)
    return client.get(f"/v1/videos/{video_id}/content").raise_for_status().content


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Checks that an answer is an error in the one shape; returns its message."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    return error["message"]
