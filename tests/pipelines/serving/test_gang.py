"""Processes that share each video: the same videos as of one; stopped together, and replaced together."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from pipelines.config import Config
from pipelines.generation.generate import video_spec
from pipelines.generation.limits import check_sharing, shape_limits
from pipelines.serving import serve
from pipelines.serving.errors import ApiError
from pipelines.serving.protocol import VideoRequest
from pipelines.serving.replica import GangError, VideoGenerator
from prophy.errors import ProPhyError
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config
from tests.servers import (
    LIMITS,
    LONG,
    PROMPT,
    http_server,
    save_checkpoint,
    serve_config,
    submit,
    until,
    wait,
)

FIRST, FOLLOWER = "ray::ServeReplica:prophy:VideoGenerator", "ray::Follower"
VIDEO = {"prompt": PROMPT, "seed": 3, "seconds": "1", "num_inference_steps": 3}
KNOBS = {"physics": {"scale": 1.5, "strength": {"collision": 3.0}, "return_maps": True}}


def shared_by(how: str, folder: Path, checkpoint: Path, *overrides: str) -> Config:
    """In float32: in bfloat16 the order of a sum is seen in the video."""
    return serve_config(folder, checkpoint, "backbone.autocast=null", how, *overrides)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("gang") / "model")


@contextmanager
def one_process(config: Config) -> Iterator[httpx.Client]:
    limits = shape_limits(config)
    generate = VideoGenerator(config, limits).generate
    with (
        http_server(config, generate, limits=limits) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@contextmanager
def processes_that_share(config: Config) -> Iterator[httpx.Client]:
    with serve.serving(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
    until(lambda: not processes(FOLLOWER), "no process is left")


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server whose replica is one process."""
    config = shared_by("serve.sequence_parallel=1", tmp_path_factory.mktemp("alone"), checkpoint)
    with one_process(config) as client:
        yield client


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """A client of a server whose replica is two processes; unless a test asks for else, they share tokens."""
    how = getattr(request, "param", "serve.sequence_parallel=2")
    with processes_that_share(shared_by(how, tmp_path_factory.mktemp("shared"), checkpoint)) as client:
        yield client


def processes(actor: str) -> list[psutil.Process]:
    """Ray puts an actor's name into the title of its process."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if re.match(actor, " ".join(process.cmdline())):
                found.append(process)
    return found


def frames_of(client: httpx.Client, video_id: str) -> np.ndarray:
    wait(client, video_id)
    content = client.get(f"/v1/videos/{video_id}/content").raise_for_status().content
    with av.open(io.BytesIO(content), mode="r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(int)


def check_same(frames: np.ndarray, ours: np.ndarray) -> None:
    difference = abs(frames - ours)
    print(f"frames differ by up to {difference.max()} of 255, by {difference.mean():.1e} in the mean")
    assert difference.max() <= 16 and difference.mean() < 0.1


def check_same_video_and_maps(alone: httpx.Client, shared: httpx.Client) -> None:
    """But for what compression makes of rounding."""
    ids = [submit(client, **VIDEO, **KNOBS) for client in (alone, shared)]
    frames, ours = (
        frames_of(client, video_id) for client, video_id in zip((alone, shared), ids, strict=True)
    )
    assert frames.shape == ours.shape == (9, 32, 32, 3) and frames.std() > 5
    check_same(frames, ours)
    maps, our_maps = (
        client.get(f"/v1/videos/{video_id}/physics").raise_for_status().json()["maps"]
        for client, video_id in zip((alone, shared), ids, strict=True)
    )
    assert maps.keys() == our_maps.keys()
    assert all(np.abs(np.subtract(maps[name], our_maps[name])).max() < 1e-3 for name in maps)


# First: a cluster runs one `prophy serve`, and that of `shared` stays until the last test.
@pytest.mark.slow
@pytest.mark.parametrize("how", ["serve.sequence_parallel=2", "serve.cfg_parallel=true"])
def test_two_processes_serve_the_video_of_one_by_cogvideox(
    ray_cluster: None, tmp_path: Path, how: str
) -> None:
    """Its passes of guidance are one batch, and its text goes through the blocks too."""
    backbone = str(write_pipeline(tmp_path / "backbone"))
    branch = save_checkpoint(tmp_path / "branch", "cogvideox", backbone)
    overrides = ("backbone.family=cogvideox", f"backbone.pretrained={backbone}")
    length = f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}"
    one, several = (
        shared_by(number, tmp_path / number, branch, *overrides, length)
        for number in ("serve.sequence_parallel=1", how)
    )
    with one_process(one) as alone, processes_that_share(several) as shared:
        check_same_video_and_maps(alone, shared)


def test_two_processes_serve_the_video_of_one(alone: httpx.Client, shared: httpx.Client) -> None:
    """Tokens are summed in another order."""
    check_same_video_and_maps(alone, shared)


def test_two_processes_begin_with_the_image_of_a_request(alone: httpx.Client, shared: httpx.Client) -> None:
    buffer = io.BytesIO()
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
    Image.fromarray(colours.repeat(20, 0).repeat(20, 1)).save(buffer, "png")
    fields = {name: str(value) for name, value in VIDEO.items()}
    ids = [
        client.post("/v1/videos", data=fields, files={"input_reference": buffer.getvalue()}).json()["id"]
        for client in (alone, shared)
    ]
    frames, ours = (
        frames_of(client, video_id) for client, video_id in zip((alone, shared), ids, strict=True)
    )
    check_same(frames, ours)


def test_a_video_that_is_deleted_stops_both_processes(shared: httpx.Client) -> None:
    """Else they were no longer in step, and none of the next videos the same."""
    before = frames_of(shared, submit(shared, **VIDEO))
    [follower] = processes(FOLLOWER)
    doomed = submit(shared, **LONG)
    wait(shared, doomed, progress=1)
    shared.delete(f"/v1/videos/{doomed}").raise_for_status()
    assert np.array_equal(frames_of(shared, submit(shared, **VIDEO)), before)
    assert processes(FOLLOWER) == [follower], "it was started anew"


@pytest.mark.slow
@pytest.mark.parametrize("actor", [FIRST, FOLLOWER])
def test_a_killed_process_costs_no_video(shared: httpx.Client, actor: str) -> None:
    """The other one goes with it, and two new ones make the video, once."""
    before, requeued = frames_of(shared, submit(shared, **VIDEO)), num_requeued(shared)
    both = processes(FIRST) + processes(FOLLOWER)
    video_id = submit(shared, **LONG | {"num_inference_steps": 40})
    wait(shared, video_id, progress=1)
    [killed] = processes(actor)
    killed.kill()
    frames_of(shared, video_id)
    assert num_requeued(shared) == requeued + 1
    psutil.wait_procs(both)
    assert len(both) == 2 and len(processes(FIRST)) == len(processes(FOLLOWER)) == 1
    assert np.array_equal(frames_of(shared, submit(shared, **VIDEO)), before)


def num_requeued(client: httpx.Client) -> int:
    text = client.get("/metrics").raise_for_status().text
    return int(float(re.findall(r"^prophy_videos_requeued_total (\S+)", text, re.MULTILINE)[0]))


@pytest.mark.slow
def test_a_killed_process_of_an_idle_replica_is_replaced(shared: httpx.Client) -> None:
    """Without a request that would find out: Serve asks how it is."""
    both = processes(FIRST) + processes(FOLLOWER)
    processes(FOLLOWER)[0].kill()
    psutil.wait_procs(both)
    frames_of(shared, submit(shared, **VIDEO))
    assert len(processes(FIRST)) == len(processes(FOLLOWER)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("actor", [FIRST, FOLLOWER])
def test_memory_that_lacks_in_one_process_is_told_and_ends_the_others(
    ray_cluster: None, checkpoint: Path, tmp_path: Path, actor: str
) -> None:
    """They wait for it in the middle of a step; the next check of the device finds that they are gone."""
    config = shared_by("serve.cfg_parallel=true", tmp_path, checkpoint)

    def lack_memory(sampler: Any) -> None:
        import torch

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError

        sampler._pipeline.transformer.register_forward_pre_hook(fail)

    @ray.remote(num_cpus=0, max_calls=1)
    def errors() -> list[str]:
        from pipelines.serving.gang import Gang

        gang = Gang(config)
        if actor == FIRST:
            lack_memory(gang)
        else:
            [follower] = gang._followers
            ray.get(follower.__ray_call__.remote(lambda follower: lack_memory(follower._sampler)))
        said = []
        for attempt in (lambda: gang.render(video_spec(config, PROMPT)), gang.check_device):
            with pytest.raises((ProPhyError, GangError)) as raised:
                attempt()
            said.append(f"{raised.typename}: {raised.value}")
        return said

    told, found = ray.get(errors.remote())
    assert re.fullmatch(r"ProPhyError: a video of .* took more memory than there is; .*", told)
    assert found.startswith("GangError: ")


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["serve.cfg_parallel=true"], indirect=True)
def test_two_processes_compute_one_pass_of_guidance_each(alone: httpx.Client, shared: httpx.Client) -> None:
    """Also after a video that was deleted, and of a video without guidance, which has one pass."""
    check_same_video_and_maps(alone, shared)
    doomed = submit(shared, **LONG)
    wait(shared, doomed, progress=1)
    shared.delete(f"/v1/videos/{doomed}").raise_for_status()
    for scale in (1.0, 4.0):
        video = VIDEO | {"guidance_scale": scale}
        check_same(*(frames_of(client, submit(client, **video)) for client in (alone, shared)))
    assert len(processes(FIRST)) == len(processes(FOLLOWER)) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.step_cache.first_block=0.1", "would skip other steps each; leave sampling.step_cache out"),
        ("backbone.compile=regional", r"set backbone.compile \('regional'\) to 'none'"),
        ("checkpoint=null", "of a model with a branch alone; name a checkpoint"),
        ("serve.sequence_parallel=7", "so many processes cannot share out . attention heads"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(
    tmp_path: Path, override: str, message: str
) -> None:
    config = tiny_config(tmp_path, "serve.sequence_parallel=2", override)
    with pytest.raises(ProPhyError, match=message):
        check_sharing(config, shape_limits(config))


def test_a_step_cache_that_looks_at_both_passes_of_guidance_is_refused(tmp_path: Path) -> None:
    family, backbone = "backbone.family=cogvideox", write_pipeline(tmp_path / "cogvideox")
    for step_cache, refused in (("first_block=0.1", True), ("taylorseer=2", False)):
        config = tiny_config(
            tmp_path,
            family,
            f"backbone.pretrained={backbone}",
            "checkpoint=null",
            "serve.cfg_parallel=true",
            f"sampling.step_cache.{step_cache}",
        )
        with pytest.raises(ProPhyError, match="first_block looks at both") if refused else nullcontext():
            check_sharing(config, shape_limits(config))


def test_a_video_whose_tokens_cannot_be_shared_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "serve.sequence_parallel=8")
    limits = LIMITS.model_copy(update={"sequence_parallel": 8})
    request: dict[str, Any] = {"prompt": PROMPT, "size": "16x16"}
    assert VideoRequest(**request | {"seconds": "1.5"}).to_spec(config, limits).num_frames == 13
    with pytest.raises(ApiError, match=r"9 frames of 16x16 have 12 tokens, which the 8 processes .* cannot"):
        VideoRequest(**request | {"seconds": "1"}).to_spec(config, limits)


def test_processes_that_share_a_video_have_one_gpu_each(tmp_path: Path) -> None:
    for how in ("serve.sequence_parallel=2", "serve.cfg_parallel=true"):
        for override in ("serve.num_gpus=0.5", "serve.num_gpus=2", "serve.num_cpus=0"):
            with pytest.raises(ProPhyError, match="each of the 2 processes .* a GPU of its own or none"):
                tiny_config(tmp_path, how, override)
