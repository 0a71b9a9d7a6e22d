"""The Videos API over real HTTP with the real model, in one process: Ray is left to `test_serve.py`."""

import io
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from pipelines.config import Config
from pipelines.generation.limits import shape_limits
from pipelines.serving import drawing
from pipelines.serving.replica import VideoGenerator
from tests.servers import (
    LIMITS,
    LONG,
    PROMPT,
    SHORT,
    check_error,
    http_server,
    make,
    poll,
    serve_config,
    submit,
    wait,
)
from tests.wisa import PHENOMENA

STEP = {"num_inference_steps": 1, "seed": 0}


def test_limits_of_the_model(config: Config) -> None:
    assert shape_limits(config) == LIMITS


@pytest.fixture(scope="module")
def openai_client(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def with_maps(client: httpx.Client) -> str:
    video_id = submit(client, **SHORT, size="48x64", seconds="2", physics={"return_maps": True})
    wait(client, video_id)
    return video_id


def decode(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_prompt_becomes_a_playable_video(client: httpx.Client) -> None:
    form = {"prompt": PROMPT, "size": "48x64", "seconds": "2", "num_inference_steps": "8", "seed": "7"}
    created = client.post("/v1/videos", files={name: (None, value) for name, value in form.items()})
    video = created.json()
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["seconds"], video["size"], video["seed"]) == ("2.125", "48x64", 7)
    assert created.headers["openai-poll-after-ms"] == "1000"
    *unfinished, done = poll(client, video["id"])
    progress = [video["progress"] for video in unfinished]
    assert progress == sorted(progress)
    assert {number for number in progress if 0 < number < 99}, "progress moves with the denoising steps"
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["expires_at"] == pytest.approx(done["completed_at"] + 7 * 86400, abs=1)
    assert list(done["stage_durations"]) == ["text", "denoise", "decode", "encode"]
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(content.content), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (48, 64, 8)
        assert len(list(container.decode(stream))) == 17
    thumbnail = client.get(f"/v1/videos/{video['id']}/content", params={"variant": "thumbnail"})
    assert thumbnail.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (48, 64)
    assert "openai-poll-after-ms" not in client.get(f"/v1/videos/{video['id']}").headers


def test_ranges(client: httpx.Client) -> None:
    video_id = submit(client, **SHORT)
    wait(client, video_id)
    path = f"/v1/videos/{video_id}/content"
    whole = client.get(path)
    size = len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes" and int(whole.headers["content-length"]) == size
    for asked, start, end in (
        ("4-11", 4, 12),
        ("-8", size - 8, size),
        ("8-", 8, size),
        ("0-99999999", 0, size),
    ):
        part = client.get(path, headers={"range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, whole.content[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for ignored in ({"range": "lines=1-2"}, {"range": "bytes=1-2", "if-range": '"another"'}):
        assert client.get(path, headers=ignored).status_code == 200
    outside = client.get(path, headers={"range": f"bytes={size}-"})
    check_error(outside, 416, "range_not_satisfiable")
    assert outside.headers["content-range"] == f"bytes */{size}"
    for headers in ({}, {"range": "bytes=4-11"}):
        head = client.head(path, headers=headers)
        assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", size)


def test_what_a_client_has_already_is_not_sent_again(client: httpx.Client) -> None:
    video_id = submit(client, **SHORT)
    wait(client, video_id)
    for path in (f"/v1/videos/{video_id}/content", "/", "/page/form.js"):
        etag = client.get(path).headers["etag"]
        for held in (etag, f"W/{etag}", f'"another", {etag}', "*"):
            for method in ("GET", "HEAD") if path.startswith("/v1") else ("GET",):
                answer = client.request(method, path, headers={"if-none-match": held, "range": "bytes=4-11"})
                assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert client.get(path, headers={"if-none-match": f'"another{etag[1:]}'}).status_code == 200


def test_openai_client(openai_client: Any) -> None:
    video = openai_client.videos.create_and_poll(
        prompt=PROMPT,
        seconds="1",
        size="32x32",
        extra_body={"seed": 3, "num_inference_steps": 1, "physics": {"strength": {"collision": 2.0}}},
        poll_interval_ms=20,
    )
    assert (video.status, video.progress, video.seconds) == ("completed", 100, "1.125")
    assert video.physics["strength"] == {"collision": 2.0}
    assert len(decode(openai_client.videos.download_content(video.id).read())) == 9
    assert openai_client.videos.download_content(video.id, variant="thumbnail").read()[:4] == b"RIFF"
    assert video.id in [listed.id for listed in openai_client.videos.list(limit=1)], (
        "pages follow by themselves"
    )
    assert openai_client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.videos.retrieve(video.id)
    assert (missing.value.code, missing.value.type) == ("video_not_found", "invalid_request_error")
    with pytest.raises(openai.UnprocessableEntityError, match="did you mean 'seed'") as caught:
        openai_client.videos.create(prompt=PROMPT, extra_body={"sead": 3})
    assert caught.value.param == "sead"
    assert openai_client.models.retrieve("prophy-tiny") == openai_client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="there is 'prophy-tiny'"):
        openai_client.models.retrieve("sora-2")


def test_openai_client_that_tries_again_with_one_key_makes_one_video(client: httpx.Client) -> None:
    class LosesAnswers(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            super().handle_request(request).read()
            requests.append(request)
            raise httpx.ReadTimeout("the answer is lost", request=request)

    url = f"{client.base_url}/v1"
    requests: list[httpx.Request] = []
    http_client: Any = httpx.Client(transport=LosesAnswers(), timeout=60)
    retrying = openai.OpenAI(base_url=url, api_key="unused", max_retries=2, http_client=http_client)
    with pytest.raises(openai.APITimeoutError):
        retrying.videos.create(prompt="again", extra_headers={"idempotency-key": "one"}, extra_body=STEP)
    assert len(requests) == 3
    patient = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    made = patient.videos.create(prompt="again", extra_headers={"idempotency-key": "one"}, extra_body=STEP)
    listed = client.get("/v1/videos", params={"limit": 100}).json()["data"]
    assert [video["id"] for video in listed if video["prompt"] == "again"] == [made.id]
    wait(client, made.id)
    sync: dict[str, Any] = {"json": STEP | {"prompt": "again"}, "headers": {"idempotency-key": "one"}}
    content = client.post("/v1/videos/sync", **sync).raise_for_status().content
    assert content == client.get(f"/v1/videos/{made.id}/content").content
    sync["json"] = STEP | {"prompt": "another"}
    reused = client.post("/v1/videos", **sync)
    assert made.id in check_error(reused, 422, "idempotency_key_reused", "idempotency-key")
    sync["headers"] = {"idempotency-key": ""}
    check_error(client.post("/v1/videos", **sync), 422, "invalid_value", "idempotency-key")


def test_curl(client: httpx.Client, tmp_path: Path) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-sS", *arguments], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    url = f"{client.base_url}/v1/videos"
    video = json.loads(curl(url, "-F", f"prompt={PROMPT}", "-F", "num_inference_steps=1"))
    wait(client, video["id"])
    curl(f"{url}/{video['id']}/content", "-o", str(tmp_path / "video.mp4"))
    assert len(decode((tmp_path / "video.mp4").read_bytes())) == 5


def test_sync(client: httpx.Client) -> None:
    response = client.post("/v1/videos/sync", json=SHORT)
    assert response.headers["content-type"] == "video/mp4"
    assert response.content == make(client)
    check_error(client.post("/v1/videos/sync", json={"prompt": ""}), 422, "invalid_value", "prompt")


def test_physics_knobs(client: httpx.Client) -> None:
    plain = make(client)
    assert make(client, physics={"scale": 1.0, "strength": {"collision": 1}}) == plain
    knobs = (
        {"scale": 0.0},
        {"strength": {"Liquid Motion": 9.0}},
        {"invert_refinement": True},
    )
    assert len({plain, *(make(client, physics=knob) for knob in knobs)}) == 4


def test_routing_maps(client: httpx.Client, with_maps: str) -> None:
    physics = client.get(f"/v1/videos/{with_maps}/physics").json()
    assert physics["object"] == "video.physics"
    assert sum(physics["semantic_weights"]) == pytest.approx(1, abs=1e-3)
    assert list(physics["maps"]) == [*PHENOMENA]
    maps = np.array(list(physics["maps"].values()))
    assert list(maps.shape[1:]) == physics["token_grid"]
    assert 0 <= maps.min() < maps.max() <= 1
    video = decode(client.get(f"/v1/videos/{with_maps}/content").content)
    overlays = [
        decode(client.get(f"/v1/videos/{with_maps}/physics/overlay", params={"phenomenon": name}).content)
        for name in ("collision", "liquid motion")
    ]
    assert [overlay.shape for overlay in overlays] == [video.shape] * 2
    assert not np.array_equal(overlays[0], overlays[1]) and not np.array_equal(overlays[0], video)
    plain = submit(client, **SHORT)
    wait(client, plain)
    check_error(client.get(f"/v1/videos/{plain}/physics"), 409, "no_maps")
    for name, reason in (("magic", "did you mean"), ("../collision", "cannot be the name")):
        wrong = client.get(f"/v1/videos/{with_maps}/physics/overlay", params={"phenomenon": name})
        assert reason in check_error(wrong, 422, "invalid_value", "phenomenon")
    asked = {"phenomenon": "collision", "variant": "layer"}
    layer = client.get(f"/v1/videos/{with_maps}/physics/overlay", params=asked)
    assert layer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(layer.content))
    _, rows, columns = physics["token_grid"]
    # 17 frames in 5 columns.
    assert picture.mode == "RGBA" and picture.size == (5 * columns, 4 * rows)
    spelled = client.get(f"/v1/videos/{with_maps}/physics/overlay", params={"phenomenon": "Liquid_Motion"})
    assert np.array_equal(decode(spelled.content), overlays[1])


def test_overlay_for_two_at_once_and_of_a_video_that_goes(
    client: httpx.Client, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    video_id = submit(client, **SHORT, physics={"return_maps": True})
    wait(client, video_id)

    def overlay(phenomenon: str) -> httpx.Response:
        return client.get(f"/v1/videos/{video_id}/physics/overlay", params={"phenomenon": phenomenon})

    draw, begun, is_gone = drawing.draw_overlay, threading.Event(), threading.Event()

    def draw_of_what_is_gone(*of: Any) -> bytes:
        begun.set()
        assert is_gone.wait(60)
        return draw(*of)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(overlay, ["collision"] * 2)
        assert decode(first.content).shape == (5, 32, 32, 3) and first.content == second.content
        monkeypatch.setattr(drawing, "draw_overlay", draw_of_what_is_gone)
        late = pool.submit(overlay, "liquid motion")
        assert begun.wait(60)
        client.delete(f"/v1/videos/{video_id}").raise_for_status()
        is_gone.set()
    check_error(late.result(), 404, "video_not_found")
    assert not Path(config.serve.videos_location, video_id).exists()


def test_settings_say_the_bounds_of_what_is_asked_for(client: httpx.Client) -> None:
    settings = client.get("/v1/settings").json()
    assert settings["ranges"] == {
        "seed": [0, 2**53 - 1],
        "num_inference_steps": [1, 200],
        "guidance_scale": [0, 20],
        "fps": [1, 120],
        "physics.scale": [0, 10],
        "physics.strength": [0, 10],
    }
    for name, (low, high) in settings["ranges"].items():
        section, _, key = name.rpartition(".")
        for value in (low - 1, high + 1):
            wrong = {"collision": value} if key == "strength" else value
            fields = {section: {key: wrong}} if section else {key: wrong}
            answer = client.post("/v1/videos", json={"prompt": PROMPT, **fields})
            assert answer.status_code == 422 and name in answer.json()["error"]["param"]


def test_a_video_says_which_phenomena_its_prompt_names(client: httpx.Client) -> None:
    for prompt, named in ((PROMPT, ["collision"]), ("a cat", []), ("ice melts in a fire", ["melting"])):
        video_id = submit(client, **(SHORT | {"prompt": prompt}))
        assert wait(client, video_id)["phenomena"] == named


def test_prompts_are_embedded_once(client: httpx.Client, generator: VideoGenerator) -> None:
    before = generator._sampler.embed.cache_info()
    for seed in (1, 2):
        make(client, prompt="a glass of water", seed=seed)
    after = generator._sampler.embed.cache_info()
    assert after.misses - before.misses == 1


def test_bounded_queue_and_delete(client: httpx.Client, generator: VideoGenerator) -> None:
    long = submit(client, **LONG)
    wait(client, long, progress=1)
    message = check_error(client.get(f"/v1/videos/{long}/content"), 409, "video_not_ready")
    assert re.search(r"is in_progress, \d+ % done", message)
    deleted = {"id": long, "object": "video.deleted", "deleted": True}
    passes: list[None] = []
    transformer = generator._sampler._pipeline.transformer
    with transformer.register_forward_pre_hook(lambda *_: passes.append(None)):
        assert client.delete(f"/v1/videos/{long}").json() == deleted
        make(client)
    assert len(passes) < 100, "the deleted video went on"
    check_error(client.get(f"/v1/videos/{long}"), 404, "video_not_found")


def test_pages(client: httpx.Client) -> None:
    ids = [submit(client, **SHORT) for _ in range(3)]
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


def test_pages_of_documentation_need_no_other_server(client: httpx.Client) -> None:
    page = client.get("/docs").raise_for_status().text
    used = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)
    assert len(used) >= 4 and not re.search(r"https?://", page)
    for path in used:
        assert client.get(path).raise_for_status().content
    check_error(client.get("/redoc"), 404, "not_found")


def test_models_health_metrics_and_description(client: httpx.Client) -> None:
    make(client)
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("prophy-tiny", "model")
    assert client.get("/healthz").json() == client.get("/health").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    for operation in ("edits", "extensions", "characters", "video_1/remix"):
        check_error(client.post(f"/v1/videos/{operation}", json=SHORT), 501, "not_implemented")
    described = client.get("/openapi.json").json()
    body = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"prompt", "seconds", "size", "physics"} <= body["properties"].keys()
    check_error(client.get("/v1/videos/video_x"), 404, "video_not_found")
    metrics = client.get("/metrics").text
    for sample in (
        'prophy_jobs{status="queued"} 0.0',
        "prophy_replicas 1.0",
        "prophy_queue_wait_seconds_count",
        'prophy_stage_seconds_count{stage="denoise"}',
        "prophy_step_seconds_count",
        "prophy_videos_completed_total",
        'prophy_videos_failed_total{code="replica_died"} 0.0',
        'prophy_http_errors_total{code="video_not_found"}',
        'prophy_http_request_seconds_count{method="POST",route="/v1/videos",status="200"}',
    ):
        assert sample in metrics


def test_not_ready(config: Config, generator: VideoGenerator, tmp_path: Path) -> None:
    loading = serve_config(tmp_path, Path(config.checkpoint))
    with (
        http_server(loading, generator.generate, is_ready=False) as url,
        httpx.Client(base_url=url) as client,
    ):
        answer = client.get("/readyz")
        check_error(answer, 503, "not_ready")
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 200


def test_expired_video(config: Config, generator: VideoGenerator, tmp_path: Path) -> None:
    short_lived = serve_config(tmp_path, Path(config.checkpoint), "serve.expire_after_s=0.001")
    with http_server(short_lived, generator.generate) as url, httpx.Client(base_url=url) as client:
        video_id = submit(client, **SHORT)
        wait(client, video_id)
        for path in ("content", "content?variant=thumbnail"):
            assert "expired" in check_error(client.get(f"/v1/videos/{video_id}/{path}"), 410, "video_expired")
        check_error(client.get(f"/v1/videos/{'video_' + 32 * 'f'}/content"), 404, "video_not_found")
