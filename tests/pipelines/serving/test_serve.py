"""The endpoint on Ray Serve: real requests to one running server, started anew after a SIGTERM under load."""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray.serve.schema import ApplicationStatus, ReplicaState

from pipelines.config import Config
from pipelines.generation import generate
from pipelines.generation.spec import StepCache
from pipelines.serving import adoption, serve
from pipelines.serving.jobs import JobStore
from pipelines.serving.service import GeneratorStatus
from prophy.errors import ProPhyError
from tests.conftest import tiny_config
from tests.pipelines.serving.test_jobs import SPEC, execute
from tests.servers import (
    LONG,
    PROMPT,
    SHORT,
    check_error,
    make,
    poll,
    save_checkpoint,
    serve_config,
    submit,
    until,
    wait,
)
from tests.wan import I2V_SEQUENCE_LENGTH, write_i2v

NUM_JOBS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("serve")
    overrides = ("serve.max_queued=20", "sampling.step_cache.first_block=0")
    return serve_config(folder / "run", save_checkpoint(folder / "model"), *overrides)


@pytest.fixture(scope="module")
def interrupted(ray_cluster: None, config: Config) -> dict[str, Any]:
    """The jobs of a server that got SIGTERM in mid-video, and what that server had printed."""
    printed, found, ended = io.StringIO(), dict[str, Any](), threading.Event()

    def interrupt() -> None:
        try:
            until(lambda: ended.is_set() or "serving on" in printed.getvalue(), "the server accepts requests")
            [url] = re.findall(r"serving on (http://\S+:\d+)", printed.getvalue())
            with httpx.Client(base_url=url, timeout=60) as client:
                found["ids"] = [submit(client, **SHORT | {"seed": seed}) for seed in range(NUM_JOBS - 1)]
                found["ids"].append(submit(client, **LONG | {"num_inference_steps": 20}))
                found["last"] = wait(client, found["ids"][-1], progress=1)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    try:
        with contextlib.redirect_stdout(printed):
            serve.run(config)
    finally:
        ended.set()
    watcher.join()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return {"printed": printed.getvalue(), **found}


@pytest.fixture(scope="module")
def client(interrupted: dict[str, Any], config: Config) -> Iterator[httpx.Client]:
    """A client of the second server in the same folder."""
    with serve.serving(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_sigterm_under_load_and_the_next_server_makes_every_video(
    interrupted: dict[str, Any], client: httpx.Client
) -> None:
    assert re.search(r"curl http://127.0.0.1:[0-9]+/v1/videos", interrupted["printed"])
    assert interrupted["last"]["status"] == "in_progress", "the server waited for the video to be finished"
    assert len(interrupted["ids"]) == NUM_JOBS
    for video_id in interrupted["ids"]:
        assert wait(client, video_id)["status"] == "completed"
    assert wait(client, interrupted["ids"][-1])["num_inference_steps"] == 20


def test_progress_moves_with_the_steps(client: httpx.Client) -> None:
    progress = [
        video["progress"] for video in poll(client, submit(client, **LONG | {"num_inference_steps": 20}))
    ]
    assert progress == sorted(progress) and progress[-1] == 100
    assert len({number for number in progress if 0 < number < 99}) > 1


def test_same_seed_same_video_over_http_and_offline(client: httpx.Client, config: Config) -> None:
    """Also with a step cache in the server alone, since its threshold of 0 lets nothing pass."""
    uncached = config.sampling.model_copy(update={"step_cache": StepCache()})
    (offline,) = generate.run(config.model_copy(update={"sampling": uncached}), [PROMPT])
    over_http = make(client, num_inference_steps=2, seed=config.generate.seed)
    assert over_http == Path(offline).read_bytes()
    assert over_http != make(client, num_inference_steps=2, seed=config.generate.seed + 1)


def test_same_seed_and_image_same_video_over_http_and_offline(
    client: httpx.Client, config: Config, tmp_path: Path
) -> None:
    image = tmp_path / "squares.png"
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
    Image.fromarray(colours.repeat(20, 0).repeat(20, 1)).save(image)
    (offline,) = generate.run(config, [PROMPT], [image])
    knobs = {"prompt": PROMPT, "num_inference_steps": "2", "seed": str(config.generate.seed)}
    sent = client.post("/v1/videos", data=knobs, files={"input_reference": image.read_bytes()})
    video_id = sent.raise_for_status().json()["id"]
    assert wait(client, video_id)["image"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert client.get(f"/v1/videos/{video_id}/content").content == Path(offline).read_bytes()
    wrong = client.post("/v1/videos", data=knobs, files={"input_reference": b"png"})
    check_error(wrong, 422, "invalid_image", "input_reference")


def test_one_video_at_a_time_and_delete(client: httpx.Client) -> None:
    long = submit(client, **LONG)
    wait(client, long, progress=1)
    begun = time.monotonic()
    progress = wait(client, long, progress=6)["progress"]
    remaining_s = (time.monotonic() - begun) * (100 - progress) / (progress - 1)
    queued = [submit(client, **SHORT) for _ in range(2)]
    assert [client.get(f"/v1/videos/{video}").json()["status"] for video in queued] == ["queued"] * 2
    for video in (queued[0], long):
        deleted = {"id": video, "object": "video.deleted", "deleted": True}
        assert client.delete(f"/v1/videos/{video}").json() == deleted
        check_error(client.get(f"/v1/videos/{video}"), 404, "video_not_found")
    start = time.monotonic()
    wait(client, queued[1])
    assert time.monotonic() - start < remaining_s / 2, "the deleted video went on"


HEAD = "POST /v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED, EXPECTING = "transfer-encoding: chunked\r\n", "expect: 100-continue\r\n"


def sized(body: str) -> str:
    return f"content-length: {len(body)}\r\n"


def chunk(body: str) -> str:
    return f"{len(body):x}\r\n{body}\r\n"


# What is sent, a piece at a time, to ask for the video of a body.
WAYS_TO_ASK: dict[str, Callable[[str], list[str]]] = {
    "at once": lambda body: [f"{HEAD}{sized(body)}\r\n{body}"],
    "head, then body": lambda body: [f"{HEAD}{sized(body)}\r\n", body],
    "in pieces": lambda body: [f"{HEAD}{sized(body)}", "\r\n", body[:9], body[9:40], body[40:]],
    "in chunks": lambda body: [f"{HEAD}{CHUNKED}\r\n", chunk(body[:9]), f"{chunk(body[9:])}0\r\n\r\n"],
    "after a question": lambda body: [f"{HEAD}{EXPECTING}{sized(body)}\r\n", body],
    "with another request": lambda body: [
        f"{HEAD}{sized(body)}\r\n",
        f"{body}GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
}


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def close_half(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def test_sync_clients_that_go_away_stop_their_videos(client: httpx.Client) -> None:
    """However their bytes were cut, and however they leave: one from its video, the others from the queue."""

    def left() -> dict[int, str]:
        listed = client.get("/v1/videos", params={"limit": 100}).json()["data"]
        return {video["seed"]: video["status"] for video in listed if video["seed"] in seeds}

    seeds = range(4711, 4711 + 3 * len(WAYS_TO_ASK))
    ways = [(ask, leave) for ask in WAYS_TO_ASK for leave in (close, reset, close_half)]
    connections = [socket.create_connection((client.base_url.host, client.base_url.port)) for _ in ways]
    bodies = [json.dumps(LONG | {"seed": seed}) for seed in seeds]
    pieces = [WAYS_TO_ASK[ask](body) for (ask, _), body in zip(ways, bodies, strict=True)]
    for connection, parts in zip(connections, pieces, strict=True):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part.encode())
            time.sleep(0.1)  # so that each piece is a segment
    until(lambda: len(left()) == len(ways) and "in_progress" in left().values(), "one video is begun")
    for connection, (_, leave) in zip(connections, ways, strict=True):
        leave(connection)
    until(lambda: not left(), "all videos are gone")
    for connection in connections:
        connection.close()
    assert client.post("/v1/videos/sync", json=SHORT).content == make(client)
    metrics = client.get("/metrics").text
    path = 'method="POST",route="/v1/videos/sync"'
    assert f'prophy_http_request_seconds_count{{{path},status="499"}} {len(ways)}.0' in metrics
    assert not re.search(r'status="500"|code="internal_error"', metrics)


def test_full_queue(client: httpx.Client) -> None:
    long = submit(client, **LONG)
    wait(client, long, progress=1)
    answers = [client.post("/v1/videos", json=SHORT) for _ in range(25)]
    full = [answer for answer in answers if answer.status_code != 200]
    assert len(full) == 5
    for answer in full:
        check_error(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
    for video_id in [long, *(answer.json()["id"] for answer in answers if answer.status_code == 200)]:
        client.delete(f"/v1/videos/{video_id}")


def test_overlay_is_drawn_elsewhere(client: httpx.Client) -> None:
    video_id = submit(client, **SHORT, physics={"return_maps": True})
    wait(client, video_id)
    path = f"/v1/videos/{video_id}/physics/overlay"
    overlay = client.get(path, params={"phenomenon": "collision"}).raise_for_status()
    assert overlay.content[4:8] == b"ftyp"
    assert overlay.content != client.get(f"/v1/videos/{video_id}/content").content


def test_request_ids_in_answers_and_logs(client: httpx.Client) -> None:
    answer = client.post("/v1/videos", json=SHORT, headers={"x-request-id": "from-the-client"})
    assert answer.headers.get_list("x-request-id") == ["from-the-client"]
    assert re.fullmatch(r"[0-9a-f-]{36}", client.get("/healthz").headers["x-request-id"])
    wait(client, answer.json()["id"])
    node: Any = ray._private.worker._global_node
    folder = Path(node.get_session_dir_path()) / "logs" / "serve"

    def events(message: str) -> list[dict[str, Any]]:
        lines = [line for file in folder.glob("replica_prophy_VideoAPI_*") for line in file.open()]
        found = [json.loads(line) for line in lines if "from-the-client" in line and line.endswith("\n")]
        return [event for event in found if message in event["message"]]

    assert events("accepted")
    until(lambda: bool(events("completed")), "a job that a client saw completed is in the log")
    assert events("completed")[0]["video_id"] == answer.json()["id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-timeout-seconds": "0.000001"},
        {"x-request-timeout-seconds": "nan", "x-request-disconnect-disabled": "?1"},
        {"serve-multiplexed-model-id": "x", "x-session-id": "y"},
        {"x-request-id": "x" * 10_000},
        {"x-session-id": b"\xff\xfe", "x-request-id": b"\xff"},
        {"host": "localhost", "x-forwarded-for": "127.0.0.1", "content-length": "0"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_header_tricks(client: httpx.Client, headers: Any) -> None:
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/healthz").json() == {"status": "ok"}


def test_ready_and_counted(client: httpx.Client) -> None:
    make(client)
    assert client.get("/readyz").json() == {"status": "ready"}
    assert "prophy_replicas 1.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("status", "num_replicas", "is_ready"),
    [
        (ApplicationStatus.DEPLOYING, 0, False),
        (ApplicationStatus.DEPLOYING, 1, True),  # of two
        (ApplicationStatus.RUNNING, 1, True),
        (ApplicationStatus.RUNNING, 0, True),  # scaled to zero
        (ApplicationStatus.UNHEALTHY, 1, True),  # the second has no room since a node was lost
        (ApplicationStatus.UNHEALTHY, 0, False),
        (ApplicationStatus.DEPLOY_FAILED, 0, False),
    ],
)
def test_ready_while_a_replica_can_make_videos(
    monkeypatch: pytest.MonkeyPatch, status: ApplicationStatus, num_replicas: int, is_ready: bool
) -> None:
    replicas = {ReplicaState.STARTING: 1, ReplicaState.RUNNING: num_replicas}
    deployment = SimpleNamespace(replica_states=replicas)
    application = SimpleNamespace(status=status, deployments={"VideoGenerator": deployment})
    monkeypatch.setattr(serve.serve, "status", lambda: SimpleNamespace(applications={"prophy": application}))
    assert asyncio.run(serve._generator_status()) == GeneratorStatus(is_ready, num_replicas)


def test_one_server_at_a_time(client: httpx.Client, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "GONE_WITHIN_S", 0.2)
    with (
        pytest.raises(ProPhyError, match="another `prophy serve` runs on this cluster"),
        serve.serving(config),
    ):
        pass


def test_another_application_of_ray_serve_is_left_alone(
    ray_cluster: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ray.serve, "status", lambda: SimpleNamespace(applications={"prophy": None, "llm": None})
    )
    with pytest.raises(ProPhyError, match="already runs here, with prophy, llm;"):
        adoption.adopt(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("serve.database=sqlite:////proc/none/jobs.sqlite", "cannot open the job database"),
        ("serve.database=mysql://root@localhost/jobs", "neither an absolute SQLite file nor PostgreSQL"),
        ("serve.output=/dev/null/output", "cannot write to serve.output /dev/null/output: Not a directory"),
    ],
)
def test_what_is_wrong_with_the_output_is_said_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, message: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(serve, "ray_session", None)
    with (
        pytest.raises(ProPhyError, match=message),
        serve.serving(tiny_config(tmp_path, "serve.port=0", setting)),
    ):
        pass


def test_a_row_of_another_version_is_said_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(serve, "ray_session", None)
    config = tiny_config(tmp_path, "serve.port=0")
    config.serve.output.mkdir(parents=True)
    with JobStore(config.serve.database_url) as store:
        store.create(SPEC)
    execute(config.serve.output / "jobs.sqlite", "UPDATE videos SET spec = '{}'")
    with pytest.raises(ProPhyError, match="made one of its rows"), serve.serving(config):
        pass


def test_the_key_in_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="give the hash that `prophy key` prints, not the key") as caught:
        tiny_config(tmp_path, "serve.api_keys=[prophy-secret]")
    assert "secret" not in str(caught.value)


def test_taken_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # said before Ray starts
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = tiny_config(tmp_path, f"serve.port={listener.getsockname()[1]}")
        with (
            pytest.raises(ProPhyError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another"),
            serve.serving(config),
        ):
            pass


def test_a_step_cache_that_is_none_for_images_where_the_model_always_takes_one(
    ray_cluster: None, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        f"backbone.pretrained={write_i2v(tmp_path / 'backbone')}",
        f"backbone.max_sequence_length={I2V_SEQUENCE_LENGTH}",
        "checkpoint=null",
        "sampling.step_cache.sea=0.1",
    )
    with pytest.raises(ProPhyError, match=r"step_cache\.sea wants to know each step's noise level"):
        serve.build_app(config)


def test_other_machines_need_keys(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "serve.host=0.0.0.0")
    with pytest.raises(ProPhyError, match="make one with `prophy key`"), serve.serving(config):
        pass


@pytest.mark.parametrize("url", ["user:secret@host/jobs", "user:a/b@host/jobs", "host/jobs?password=secret"])
def test_password_in_the_configuration(tmp_path: Path, url: str) -> None:
    with pytest.raises(ProPhyError, match="put it into PGPASSWORD"):
        tiny_config(tmp_path, f"serve.database=postgresql://{url}")


@pytest.mark.parametrize("limit", ["max_num_frames=13", "max_pixels=1024"])
def test_defaults_beyond_the_limits(tmp_path: Path, limit: str) -> None:
    with pytest.raises(ProPhyError, match="which a request gets that names no"):
        tiny_config(tmp_path, f"serve.{limit}")


def test_replicas_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"min_replicas \(3\) must not exceed max_replicas \(2\)"):
        tiny_config(tmp_path, "serve.min_replicas=3", "serve.max_replicas=2")


@pytest.mark.parametrize("attempts", [[TimeoutError("60 s")] * 2, [ray.exceptions.ActorDiedError()]])
def test_a_serve_that_does_not_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, attempts: list[Exception]
) -> None:
    """As on a machine so busy that a proxy is given up; one that is only slow is waited for once more."""
    left = iter(attempts)
    app: Any = None  # never reached

    def start(**_: Any) -> None:
        raise next(left)

    monkeypatch.setattr(serve.serve, "start", start)
    monkeypatch.setattr(serve.serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(ProPhyError, match=r"^Ray Serve does not start: .*; is the machine too busy"):
        serve._deploy(app, "127.0.0.1", 1)
    assert not list(left)


def test_checkpoint_of_another_backbone(config: Config, tmp_path: Path) -> None:
    for file in Path(config.checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    description = next(tmp_path.glob("*.json"))
    changed = json.loads(description.read_text())
    changed["backbone"] |= {"name": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "fingerprint": "c0ffee"}
    description.write_text(json.dumps(changed))
    other = config.model_copy(update={"checkpoint": str(tmp_path)})
    with pytest.raises(ProPhyError, match="was trained on another backbone"), serve.serving(other):
        pass
