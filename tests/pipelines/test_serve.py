"""The endpoint: real requests to one running server, started anew after a SIGTERM in the midst of a video."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import torch

from pipelines import generate, serve
from pipelines.config import Config
from pipelines.protocol import ApiError, VideoRequest
from pipelines.sampling import shape_limits
from prophy.backbones import BACKBONES, fingerprint, load_pipeline
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from tests.conftest import tiny_config

PROMPT = "a red ball falls and bounces"
LONG = {"prompt": PROMPT, "num_inference_steps": 200, "size": "64x64", "seconds": "2"}
SHORT = {"prompt": PROMPT, "num_inference_steps": 1, "seed": 0}
PATIENCE_S = 240


def save_checkpoint(folder: Path) -> Path:
    """A branch whose injections are not zero, so that its knobs are seen in the video."""
    backbone = load_pipeline("wan", "tiny", None, torch.float32, None).transformer
    torch.manual_seed(0)
    transformer = BACKBONES["wan"].prophy_transformer.from_transformer(
        backbone, physics_layers=[0, 2], latent_shape=(5, 16, 16)
    )
    with torch.no_grad():
        for parameter in transformer.physics_branch.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_branch(
        transformer, folder, {"name": "tiny", "revision": None, "fingerprint": fingerprint("tiny", None)}
    )
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("serve")
    return tiny_config(
        folder / "run",
        f"checkpoint={save_checkpoint(folder / 'model')}",
        "backbone.num_frames=5",
        "backbone.height=32",
        "backbone.width=32",
        "sampling.num_inference_steps=2",
        "serve.port=0",
        "serve.max_replicas=1",
        "serve.max_queued=3",
        "serve.max_pixels=4096",
        "serve.max_num_frames=17",
    )


@pytest.fixture(scope="module")
def interrupted(ray_cluster: None, config: Config) -> dict[str, Any]:
    """A video that was being made when its server got SIGTERM, and what that server had printed."""
    printed, found = io.StringIO(), {}

    def interrupt() -> None:
        try:
            while not (match := re.search(r"http://\S+:\d+", printed.getvalue())):
                time.sleep(0.05)
            with httpx.Client(base_url=match[0], timeout=60) as client:
                job = client.post("/v1/videos", json=LONG | {"num_inference_steps": 20}).json()
                found.update(wait(client, job["id"], progress=1))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with contextlib.redirect_stdout(printed):
        serve.run(config)
    watcher.join()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return {"printed": printed.getvalue(), **found}


@pytest.fixture(scope="module")
def client(interrupted: dict[str, Any], config: Config) -> Iterator[httpx.Client]:
    """Of the second server in the same folder."""
    with serve.serving(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


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
    return next(video for video in poll(client, video_id) if video["progress"] >= progress)


def make(client: httpx.Client, **fields: Any) -> bytes:
    response = client.post("/v1/videos", json=SHORT | fields)
    assert response.status_code == 200, response.text
    wait(client, response.json()["id"])
    return client.get(f"/v1/videos/{response.json()['id']}/content").raise_for_status().content


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    return error["message"]


def test_sigterm_ends_the_server_and_the_next_one_makes_the_video(
    interrupted: dict[str, Any], client: httpx.Client
) -> None:
    assert (
        f"curl {re.search(r'http://127.0.0.1:[0-9]+', interrupted['printed'])[0]}" in interrupted["printed"]
    )
    assert interrupted["status"] == "in_progress", "the server waited for the video to be finished"
    assert wait(client, interrupted["id"])["num_inference_steps"] == 20


def test_prompt_becomes_a_playable_video(client: httpx.Client) -> None:
    form = {"prompt": PROMPT, "size": "48x64", "seconds": "2", "num_inference_steps": "8", "seed": "7"}
    video = client.post("/v1/videos", files={name: (None, value) for name, value in form.items()}).json()
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["seconds"], video["size"], video["seed"]) == ("2.125", "48x64", 7)
    *unfinished, done = poll(client, video["id"])
    progress = [video["progress"] for video in unfinished]
    assert progress == sorted(progress)
    assert {number for number in progress if 0 < number < 99}, "progress moves with the denoising steps"
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(content.content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (48, 64, 8)
        assert len(list(container.decode(stream))) == 17
    part = client.get(f"/v1/videos/{video['id']}/content", headers={"range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, content.content[4:12])


def test_same_seed_same_video_over_http_and_offline(client: httpx.Client, config: Config) -> None:
    (offline,) = generate.run(config, [PROMPT])
    over_http = make(client, num_inference_steps=2, seed=config.generate.seed)
    assert over_http == offline.read_bytes()
    assert over_http != make(client, num_inference_steps=2, seed=config.generate.seed + 1)


def test_physics_knobs(client: httpx.Client) -> None:
    plain = make(client)
    assert make(client, physics={"scale": 1.0, "strength": {"collision": 1}}) == plain
    knobs = (
        {"scale": 0.0},
        {"strength": {"Liquid Motion": 9.0}},
        {"invert_refinement": True},
    )
    assert len({plain, *(make(client, physics=knob) for knob in knobs)}) == 4


def test_one_video_at_a_time_a_bounded_queue_and_delete(client: httpx.Client) -> None:
    long = client.post("/v1/videos", json=LONG).json()
    wait(client, long["id"], progress=1)
    begun = time.monotonic()
    progress = wait(client, long["id"], progress=6)["progress"]
    remaining_s = (time.monotonic() - begun) * (100 - progress) / (progress - 1)
    message = check_error(client.get(f"/v1/videos/{long['id']}/content"), 409, "video_not_ready")
    assert re.search(r"is in_progress, \d+ % done", message)
    queued = [client.post("/v1/videos", json=SHORT).json() for _ in range(3)]
    assert [client.get(f"/v1/videos/{video['id']}").json()["status"] for video in queued] == ["queued"] * 3
    full = client.post("/v1/videos", json=SHORT)
    check_error(full, 429, "queue_full")
    assert int(full.headers["retry-after"]) > 0

    for video in (queued[1], long):
        deleted = {"id": video["id"], "object": "video.deleted", "deleted": True}
        assert client.delete(f"/v1/videos/{video['id']}").json() == deleted
        check_error(client.get(f"/v1/videos/{video['id']}"), 404, "video_not_found")
    start = time.monotonic()
    wait(client, queued[2]["id"])
    assert time.monotonic() - start < remaining_s / 2, "the deleted video went on"


def test_pages(client: httpx.Client) -> None:
    ids = [client.post("/v1/videos", json=SHORT).json()["id"] for _ in range(3)]
    first = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == [ids[2], ids[1]]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == (
        "list",
        ids[2],
        ids[1],
        True,
    )
    rest = client.get("/v1/videos", params={"after": ids[1], "limit": 100}).json()
    assert rest["first_id"] == ids[0] and not rest["has_more"]
    upwards = client.get("/v1/videos", params={"after": ids[0], "order": "asc"}).json()
    assert [video["id"] for video in upwards["data"]] == ids[1:]
    check_error(client.get("/v1/videos", params={"after": "video_x"}), 404, "video_not_found", "after")
    for video_id in ids:
        wait(client, video_id)


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        ({}, "missing_parameter", "prompt", "the field 'prompt' is missing"),
        ({"prompt": " "}, "invalid_value", "prompt", "bad value ' ' for the field 'prompt'"),
        ({"promt": "x"}, "unknown_parameter", "promt", "did you mean 'prompt'?"),
        ({"prompt": "x", "seconds": 2}, "invalid_value", "seconds", "should be a valid string"),
        ({"prompt": "x", "seconds": "4s"}, "invalid_value", "seconds", "'4s'"),
        (
            {"prompt": "x", "seconds": "3"},
            "invalid_value",
            "seconds",
            "25 frames; this model makes at most 17",
        ),
        ({"prompt": "x", "size": "big"}, "invalid_value", "size", "'big'"),
        ({"prompt": "x", "size": "36x32"}, "invalid_value", "size", "a width that is a multiple of 8"),
        ({"prompt": "x", "size": "128x128"}, "invalid_value", "size", "at most 4096"),
        ({"prompt": "x", "num_inference_steps": 0}, "invalid_value", "num_inference_steps", "greater than"),
        ({"prompt": "x", "seed": -1}, "invalid_value", "seed", "greater than"),
        ({"prompt": "x", "physics": {"sclae": 1}}, "unknown_parameter", "physics.sclae", "'physics.scale'"),
        (
            {"prompt": "x", "physics": {"strength": {"colision": 1}}},
            "invalid_value",
            "physics.strength.colision",
            "did you mean 'collision'?",
        ),
        ([1], "invalid_value", None, "[1]"),
    ],
)
def test_bad_fields(client: httpx.Client, fields: Any, code: str, param: str | None, message: str) -> None:
    assert message in check_error(client.post("/v1/videos", json=fields), 422, code, param)


def test_bad_requests(client: httpx.Client) -> None:
    check_error(
        client.post("/v1/videos", json={"prompt": "x", "model": "sora-2"}), 404, "model_not_found", "model"
    )
    broken = client.post("/v1/videos", content="{", headers={"content-type": "application/json"})
    check_error(broken, 400, "invalid_json")
    check_error(client.post("/v1/videos", content="prompt"), 415, "unsupported_media_type")
    picture = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": b"png"})
    check_error(picture, 422, "unsupported_parameter", "input_reference")
    for path in ("", "/content"):
        assert "'video_x'" in check_error(client.get(f"/v1/videos/video_x{path}"), 404, "video_not_found")
    check_error(client.delete("/v1/videos/video_x"), 404, "video_not_found")
    check_error(client.get("/v1/pictures"), 404, "not_found")
    check_error(client.put("/v1/videos"), 405, "method_not_allowed")
    check_error(client.get("/v1/videos", params={"limit": 0}), 422, "invalid_value", "limit")
    form = {"prompt": "x", "physics": '{"scale": 11}'}
    check_error(client.post("/v1/videos", data=form), 422, "invalid_value", "physics.scale")


def test_models_health_and_description(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("prophy-tiny", "model")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    described = client.get("/openapi.json").json()
    body = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"prompt", "seconds", "size", "physics"} <= body["properties"].keys()


def test_one_server_at_a_time(client: httpx.Client, config: Config) -> None:
    with pytest.raises(ProPhyError, match="Ray Serve already runs here, with prophy"), serve.serving(config):
        pass


def test_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = tiny_config(tmp_path, f"serve.port={listener.getsockname()[1]}")
        with (
            pytest.raises(ProPhyError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another"),
            serve.serving(config),
        ):
            pass


def test_replicas_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"min_replicas \(3\) must not exceed max_replicas \(2\)"):
        tiny_config(tmp_path, "serve.min_replicas=3", "serve.max_replicas=2")


def test_checkpoint_of_another_backbone(config: Config, tmp_path: Path) -> None:
    for file in config.checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    description = next(tmp_path.glob("*.json"))
    changed = json.loads(description.read_text())
    changed["backbone"] |= {"name": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "fingerprint": "c0ffee"}
    description.write_text(json.dumps(changed))
    other = config.model_copy(update={"checkpoint": tmp_path})
    with pytest.raises(ProPhyError, match="was trained on another backbone"), serve.serving(other):
        pass


def test_bare_backbone_has_no_knobs(config: Config) -> None:
    bare = config.model_copy(update={"checkpoint": None})
    request = VideoRequest.parse({"prompt": PROMPT, "physics": {"scale": 0.5}})
    with pytest.raises(ApiError, match="bare backbone"):
        request.to_spec(bare, shape_limits(bare))
