"""`prophy train` killed with SIGKILL: a worker, the driver, or its whole Ray, also during a save; then again.

Real processes with Rays of their own. The run that is left must hold the parameters, to the last bit, and
the losses of an undisturbed one. It trains an adapter beside the branch, on clips of two shapes.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines import cache, simulate
from pipelines.checkpoint import MANIFEST
from pipelines.config import Config
from pipelines.train_metrics import METRICS_FILE
from prophy.data import PriorCache
from prophy.video import read_frames, write_video
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

OVERRIDES = (
    "backbone.aspect_buckets=[[64,64],[48,80]]",
    "train.backbone=lora",
    "train.lora_rank=4",
    "train.start_from=null",
    "train.micro_batch_size=1",
    "train.num_steps=6",
    "train.save_every=2",
    "train.log_every=1",
)
VICTIMS = ("driver", "worker", "node", "save")


class Run:
    """`prophy train` in a process of its own."""

    def __init__(self, folder: Path, cache_folder: str) -> None:
        overrides = (f"run_dir={folder}", f"cache.output={cache_folder}", *OVERRIDES)
        options = [part for override in overrides for part in ("--set", override)]
        self.folder, self.log = folder, folder.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "pipelines.cli", "train", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.getcwd()},
            )
        self.family: set[psutil.Process] = set()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def kill(self, victim: str) -> None:
        """SIGKILL to the driver, to one worker, or to every process of this Ray."""
        self.family |= set(self.process.children(recursive=True))
        victims = [self.process]
        if victim in ("node", "save"):
            victims += self.family
        if victim == "worker":
            victims = [random.choice(workers)] if (workers := [*filter(is_worker, self.family)]) else []
        for process in victims:
            kill(process)

    def steps(self) -> int:
        """Steps in the metrics."""
        metrics = self.folder / "train" / METRICS_FILE
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint has files, and no manifest yet."""
        folders = (self.folder / "train" / "checkpoints").glob("step-*")
        return any(any(folder.glob("rank-*")) and not (folder / MANIFEST).exists() for folder in folders)

    def finish(self) -> None:
        assert self.process.wait() == 0, self.log.read_text()[-3000:]

    def clean_up(self) -> None:
        for process in (*self.family, self.process):
            kill(process)


def kill(process: psutil.Process) -> None:
    if process.is_running():
        process.kill()


def is_worker(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::RayTrainWorker")
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that nothing happened to; half of its clips are cropped to the wide shape."""
    folder = tmp_path_factory.mktemp("kill")
    videos = folder / "videos"
    videos.mkdir()
    config = tiny_config(folder / "run", "simulate.num_clips=12", f"cache.input={videos}", *OVERRIDES)
    simulate.run(config)
    for number, clip in enumerate(sorted(config.simulate.output.rglob("*.mp4"))):
        frames = read_frames(clip, 0.0, 2.0, 17, 64, 64)
        write_video(videos / clip.name, frames[:, 13:51] if number % 2 else frames, 8)
    cache.run(config)
    latents = PriorCache(Path(cache.priors_folder(config)), Path(cache.encodings_folder(config))).shapes
    assert Counter(latents.values()) == {(16, 5, 16, 16): 6, (16, 5, 12, 20): 6}
    Run(config.run_dir, config.cache.output).finish()
    return config


@pytest.fixture
def runs(undisturbed: Config, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Starts the same command, any number of times."""
    started: list[Run] = []

    def start() -> Run:
        started.append(Run(tmp_path / "run", undisturbed.cache.output))
        return started[-1]

    yield start
    for run in started:
        run.clean_up()


def losses(folder: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (folder / "train" / METRICS_FILE).read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def assert_equal_runs(folder: Path, undisturbed: Config) -> None:
    for name in ("physics_branch.safetensors", "pytorch_lora_weights.safetensors"):
        expected = load_file(undisturbed.run_dir / "model" / name)
        found = load_file(folder / "model" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(folder) == losses(undisturbed.run_dir)


def test_killed_during_a_save_and_a_worker_killed_later(
    runs: Callable[[], Run], undisturbed: Config, tmp_path: Path
) -> None:
    first = runs()
    first.wait_until(first.is_saving)
    first.kill("save")
    first.process.wait()
    second = runs()
    second.wait_until(lambda: second.steps() >= 3)
    second.kill("worker")
    second.finish()
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def usual_seconds(undisturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> float:
    start = time.monotonic()
    Run(tmp_path_factory.mktemp("usual") / "run", undisturbed.cache.output).finish()
    return time.monotonic() - start


@pytest.mark.parametrize("trial", range(12))
def test_a_kill_at_any_moment_costs_nothing(
    runs: Callable[[], Run], undisturbed: Config, usual_seconds: float, tmp_path: Path, trial: int
) -> None:
    random.seed(trial)
    victim = VICTIMS[trial % len(VICTIMS)]
    first = runs()
    deadline = time.monotonic() + random.uniform(0, usual_seconds)
    first.wait_until(
        first.is_saving
        if victim == "save"
        else lambda: time.monotonic() > deadline or first.process.poll() is not None
    )
    first.kill(victim)
    first.process.wait()
    runs().finish()
    assert_equal_runs(tmp_path / "run", undisturbed)
