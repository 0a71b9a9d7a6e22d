"""Training as a user runs it, at tiny size: on this machine's CPU, on its GPU, killed, resumed."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines.caching import cache
from pipelines.config import Config, load_config
from pipelines.layout import RunFolder
from pipelines.runtime import ray_session
from pipelines.sandbox import simulate
from pipelines.training import train
from pipelines.training.checkpoint_places import FolderStore
from tests.gpu.models import GPU
from tests.gpu.rows import Row, within
from tests.killing import Run

NUM_STEPS, SAVE_EVERY = (24 if GPU else 12), 4
OVERRIDES = (
    "simulate.num_clips=8",
    "train.precision=fp32",
    f"train.num_steps={NUM_STEPS}",
    f"train.save_every={SAVE_EVERY}",
    "train.log_every=1",
)
ONE_WORKER = ("train.num_workers=1", f"train.gpus_per_worker={int(GPU)}")


@ray.remote(num_cpus=0)
def gpus_seen() -> int:
    """How many devices a task sees."""
    return torch.cuda.device_count()


def check() -> Iterator[Row]:
    """Losses of every way against those of the CPU with two workers, which the clips alone decide."""
    with tempfile.TemporaryDirectory(prefix="prophy-") as name:
        folder = Path(name)

        def run(way: str, *overrides: str) -> list[dict[str, Any]]:
            train.run(config_of(folder / way, f"cache.output={on_cpu.cache.output}", *overrides))
            return metrics(folder / way)

        on_cpu = config_of(folder / "cpu")
        with ray_session(on_cpu):
            seen = ray.get(gpus_seen.options(num_gpus=0).remote())
            yield Row("GPUs that a task sees which reserves none", f"{seen}", "0", seen == 0)
            if GPU:
                seen = ray.get(gpus_seen.options(num_gpus=1).remote())
                yield Row("GPUs that a task sees which reserves one", f"{seen}", "1", seen == 1)
            simulate.run(on_cpu)
            cache.run(on_cpu)
            train.run(on_cpu)
            expected = metrics(on_cpu.run_dir)
            used = any("peak_gpu_gb" in row for row in expected)
            yield Row(
                "tiny training of 2 workers without a GPU",
                f"{len(expected)} steps, loss {expected[0]['loss']:.3f} to {expected[-1]['loss']:.3f}",
                f"{NUM_STEPS} steps, no memory of a GPU",
                len(expected) == NUM_STEPS and not used,
            )
            where = "one GPU" if GPU else "one worker"
            whole = run("zero1", *ONE_WORKER, "train.zero_stage=1")
            yield within(
                f"losses of ZeRO 1 on {where} against the CPU's", difference(whole, expected, 6), 1e-3
            )
            parts = (*ONE_WORKER, "train.zero_stage=3")
            run("zero3", *parts, f"train.num_steps={NUM_STEPS // 2}")
            halves = run("zero3", *parts)
            yield within(
                f"losses of ZeRO 3 on {where} against the CPU's", difference(halves, expected, 6), 1e-3
            )
            yield within("losses of ZeRO 3, resumed, against ZeRO 1's", difference(halves, whole), 1e-3)

        overrides = (*OVERRIDES, *ONE_WORKER, f"cache.output={on_cpu.cache.output}")
        killed = folder / "killed"
        begun = Run("train", killed, overrides, "ray::RayTrainWorker")
        try:
            checkpoints = FolderStore(str(killed / "train" / "checkpoints"))
            begun.wait_until(lambda: bool(checkpoints.committed()))
            last = len(metrics(killed))
            num_killed = begun.kill("node")
            begun.process.wait()
            again = Run("train", killed, overrides, "ray::RayTrainWorker")
            try:
                again.finish()
            finally:
                again.clean_up()
        finally:
            begun.clean_up()
        yield Row(
            "training and its Ray ended by SIGKILL",
            f"{num_killed} processes after {last} of {NUM_STEPS} steps",
            f"before {NUM_STEPS} steps",
            num_killed > 0 and last < NUM_STEPS,
        )
        yield within("losses after the same command again", difference(metrics(killed), whole), 1e-3)


def config_of(folder: Path, *overrides: str) -> Config:
    """The embedded default with two workers on the CPU, if nothing else is said."""
    return load_config("tiny", [f"run_dir={folder}", *OVERRIDES, *overrides])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """A row per step."""
    file = RunFolder(run_dir).metrics
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def difference(
    rows: list[dict[str, Any]], expected: list[dict[str, Any]], num_steps: int = NUM_STEPS
) -> float:
    """The largest relative one of the losses of the first steps; infinite where steps are missing."""
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        return float("inf")
    pairs = zip(rows[:num_steps], expected[:num_steps], strict=True)
    return max(abs(row["loss"] / other["loss"] - 1) for row, other in pairs)
