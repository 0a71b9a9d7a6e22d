"""Claim: HTTP costs next to nothing beside the model, and the endpoint stays quick while it is busy.

All in one run on the embedded default:
- throughput: videos per second over HTTP, against the bare pipeline in a loop in this process with as many
  threads; the two take turns. Bar: 95 %.
- latency of POST and GET at 50 requests/s while a video is being made, as this client sees it.
  Bar: p50 under 10 ms, p99 under 60 ms.
- time from a burst of jobs to the second replica, with a second server.
- cancelling: what the replica's process still computes after a DELETE, in seconds of CPU; the model has one
  thread. Bar: one denoising step. And the time until the next video has begun, which Serve routes to it.

    python tests/benchmarks/serving.py
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from pipelines.config import Config, load_config
from pipelines.generation.limits import shape_limits
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import VideoSpec
from pipelines.serving.serve import serving

PROMPT = "a red ball falls and bounces"
RATE_PER_S = 50
POSTS_PER_S = 5
ROUNDS = 3
DELETIONS = 8
MAX_STEPS = 200


def request_body(num_steps: int, seed: int = 0) -> dict:
    return {"prompt": PROMPT, "num_inference_steps": num_steps, "seed": seed}


def spec(config: Config, num_steps: int) -> VideoSpec:
    backbone, sampling = config.backbone, config.sampling
    return VideoSpec(
        prompt=PROMPT,
        negative_prompt=sampling.negative_prompt,
        seed=0,
        num_frames=backbone.num_frames,
        height=backbone.height,
        width=backbone.width,
        fps=backbone.fps,
        num_inference_steps=num_steps,
        guidance_scale=sampling.guidance_scale,
    )


def submit(client: httpx.Client, num_steps: int, seed: int = 0) -> str:
    response = client.post("/v1/videos", json=request_body(num_steps, seed))
    return response.raise_for_status().json()["id"]


def until(happened: Callable[[], bool], every_s: float = 0.02) -> None:
    while not happened():
        time.sleep(every_s)


def has_status(client: httpx.Client, video_id: str, *statuses: str) -> bool:
    return client.get(f"/v1/videos/{video_id}").json()["status"] in statuses


def throughput(client: httpx.Client, config: Config, num_videos: int, num_steps: int) -> dict[str, float]:
    """Seconds per video; the first of each kind is not counted."""
    torch.set_num_threads(max(1, int(config.serve.num_cpus)))
    sampler = VideoSampler(config)
    sampler.warm_up(shape_limits(config))
    seconds: dict[str, list[float]] = {"bare": [], "http": []}
    for round_ in range(ROUNDS + 1):
        begun = time.perf_counter()
        for _ in range(num_videos):
            sampler.render(spec(config, num_steps))
        between = time.perf_counter()
        ids = [submit(client, num_steps) for _ in range(num_videos)]
        for video_id in ids:  # whichever comes first
            until(partial(has_status, client, video_id, "completed"), 0.1)
        ended = time.perf_counter()
        if round_:
            seconds["bare"].append((between - begun) / num_videos)
            seconds["http"].append((ended - between) / num_videos)
    return {name: float(np.median(values)) for name, values in seconds.items()}


async def latencies(url: str, video_id: str, duration_s: float) -> dict[str, list[float]]:
    """Milliseconds of each request; they are sent on time, whether or not earlier ones are answered."""
    found: dict[str, list[float]] = {"POST": [], "GET": []}
    limits = httpx.Limits(max_connections=RATE_PER_S, max_keepalive_connections=RATE_PER_S)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def send(number: int, begin: float) -> None:
            await asyncio.sleep(begin - time.perf_counter())
            late = time.perf_counter()
            if number % (RATE_PER_S // POSTS_PER_S):
                method, response = "GET", await client.get(f"/v1/videos/{video_id}")
            else:
                method, response = "POST", await client.post("/v1/videos", json=request_body(1))
            found[method].append((time.perf_counter() - late) * 1e3)
            response.raise_for_status()

        start = time.perf_counter() + 0.1
        numbers = range(int(duration_s * RATE_PER_S))
        await asyncio.gather(*(send(number, start + number / RATE_PER_S) for number in numbers))
    return found


def delete_all(client: httpx.Client) -> None:
    while videos := client.get("/v1/videos", params={"limit": 100}).json()["data"]:
        for video in videos:
            client.delete(f"/v1/videos/{video['id']}")


def await_mid_video(client: httpx.Client, video_id: str) -> None:
    """Returns at any moment of a step."""
    until(lambda: client.get(f"/v1/videos/{video_id}").json()["progress"] > 1)
    time.sleep(random.uniform(0, 0.3))
    assert has_status(client, video_id, "in_progress"), "the steps are too quick to delete a video in them"


def cancelling(client: httpx.Client, num_steps: int) -> dict[str, list[float]]:
    """Seconds that the replica computes after each of some DELETEs, and until the next video has begun."""
    found: dict[str, list[float]] = {"computed_s": [], "next_s": [], "step_s": []}
    for seed in range(DELETIONS):
        running = submit(client, MAX_STEPS, seed)
        await_mid_video(client, running)
        before = replica_cpu_s()
        client.delete(f"/v1/videos/{running}").raise_for_status()
        found["computed_s"].append(replica_cpu_s_at_rest() - before)
    for seed in range(DELETIONS):
        running, next_ = submit(client, MAX_STEPS, seed), submit(client, num_steps, seed)
        await_mid_video(client, running)
        begun = time.perf_counter()
        client.delete(f"/v1/videos/{running}").raise_for_status()
        until(partial(has_status, client, next_, "in_progress", "completed"), 0.005)
        found["next_s"].append(time.perf_counter() - begun)
        until(partial(has_status, client, next_, "completed"))
        denoise_s = client.get(f"/v1/videos/{next_}").json()["stage_durations"]["denoise"]
        found["step_s"].append(denoise_s / num_steps)
    return found


def replica_cpu_s_at_rest() -> float:
    """As `replica_cpu_s`, once it computes no more."""
    last = replica_cpu_s()
    while True:
        time.sleep(0.25)
        now = replica_cpu_s()
        if now - last < 0.05:
            return now
        last = now


def replica_cpu_s() -> float:
    """What the one replica has computed so far."""
    [replica] = (
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ServeRepl") and "VideoGenerator" in " ".join(process.cmdline())
    )
    times = replica.cpu_times()
    return times.user + times.system


def num_replicas(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("prophy_replicas "))


def second_replica(client: httpx.Client) -> float:
    """Seconds from a burst to the second replica, where there is one."""
    until(lambda: num_replicas(client) == 1)
    begun = time.perf_counter()
    for seed in range(8):
        submit(client, MAX_STEPS, seed)
    until(lambda: num_replicas(client) == 2, 0.1)
    seconds = time.perf_counter() - begun
    delete_all(client)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=4, help="per round of the throughput")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a video")
    parser.add_argument("--seconds", type=float, default=10, help="how long to send 50 requests/s")
    parser.add_argument("--save", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prophy-") as scratch:
        settings = {"min_replicas": 1, "max_replicas": 1, "max_queued": 10_000, "port": 0}
        overrides = [f"run_dir={scratch}/run", *(f"serve.{key}={value}" for key, value in settings.items())]
        config = load_config("tiny", overrides)
        with serving(config) as url, httpx.Client(base_url=url, timeout=60) as client:
            until(lambda: client.get("/readyz").is_success)
            results["seconds_per_video"] = throughput(client, config, options.videos, options.steps)
            long = submit(client, MAX_STEPS)
            until(lambda: has_status(client, long, "in_progress"))
            results["latency_ms"] = {
                method: {f"p{share}": float(np.percentile(values, share)) for share in (50, 99)}
                for method, values in asyncio.run(latencies(url, long, options.seconds)).items()
            }
            delete_all(client)
            results["cancelling"] = cancelling(client, options.steps)
        two = load_config("tiny", [*overrides, "serve.max_replicas=2"])
        with serving(two) as url, httpx.Client(base_url=url, timeout=60) as client:
            until(lambda: client.get("/readyz").is_success)
            results["second_replica_s"] = second_replica(client)

    seconds, cancel = results["seconds_per_video"], results["cancelling"]
    table = Table("what", "measured", "bar")
    share = seconds["bare"] / seconds["http"]
    table.add_row("throughput against the bare pipeline", f"{share:.1%}", "95 %")
    table.add_row("  seconds per video, bare / HTTP", f"{seconds['bare']:.2f} / {seconds['http']:.2f}", "")
    for method, values in results["latency_ms"].items():
        for name, bar_ms in (("p50", 10), ("p99", 60)):
            table.add_row(
                f"{method} {name} at {RATE_PER_S} requests/s", f"{values[name]:.1f} ms", f"{bar_ms} ms"
            )
    table.add_row("from a burst to the second replica", f"{results['second_replica_s']:.1f} s", "")
    step_ms = np.median(cancel["step_s"]) * 1e3
    for name, what in (
        ("computed_s", "computed after DELETE, median / worst"),
        ("next_s", "from DELETE to the next video, median / worst"),
    ):
        times_ms = np.array(cancel[name]) * 1e3
        bar = f"{step_ms:.0f} ms (a step)" if name == "computed_s" else ""
        table.add_row(what, f"{np.median(times_ms):.0f} / {times_ms.max():.0f} ms", bar)
    Console().print(table)
    if options.save:
        options.save.write_text(
            json.dumps(vars(options) | {"save": None, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
