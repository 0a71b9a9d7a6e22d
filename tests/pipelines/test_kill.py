"""`prophy cache` killed with SIGKILL, driver, worker or all at once; then the same command again.

Real processes with Rays of their own. The cache that is left must hold the rows of an undisturbed run, each
once and equal to the last bit: clips are encoded one by one here, since a batch rounds as a whole.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from pipelines import cache, simulate
from pipelines.config import Config
from pipelines.sink import file_names
from pipelines.verify import verify
from prophy.schema import EMPTY_PROMPT
from tests.conftest import tiny_config

NUM_CLIPS = 6
OVERRIDES = (f"simulate.num_clips={NUM_CLIPS}", "cache.rows_per_file=2", "cache.encode_batch_size=1")
VICTIMS = ("driver", "worker", "node")


class Run:
    """`prophy cache` in a process of its own."""

    def __init__(self, folder: Path, clips: Path) -> None:
        overrides = (f"run_dir={folder}", f"cache.input={clips}", *OVERRIDES)
        options = [part for override in overrides for part in ("--set", override)]
        self.log = folder.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "pipelines.cli", "cache", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.getcwd()},
            )
        self.family: set[psutil.Process] = set()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def kill(self, victim: str) -> None:
        """SIGKILL to the driver, to one of the workers that hold rows, or to every process of this Ray."""
        self.family |= set(self.process.children(recursive=True))
        victims = [self.process]
        if victim == "node":
            victims += self.family
        if victim == "worker":
            victims = [random.choice(workers)] if (workers := [*filter(is_worker, self.family)]) else []
        for process in victims:
            kill(process)

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
        return " ".join(process.cmdline()).startswith(("ray::Map", "ray::map"))
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("kill") / "run", *OVERRIDES)
    simulate.run(config)
    cache.run(config)
    return config


@pytest.fixture
def runs(undisturbed: Config, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Starts the same command, any number of times."""
    started: list[Run] = []

    def start() -> Run:
        started.append(Run(tmp_path / "run", Path(undisturbed.cache.input)))
        return started[-1]

    yield start
    for run in started:
        run.clean_up()


def rows(folder: Path) -> dict[str, dict]:
    """All rows of a table, from its files by plain pyarrow."""
    found = [row for name in file_names(folder) for row in pq.read_table(folder / name).to_pylist()]
    assert len({row["sample_id"] for row in found}) == len(found), "a row is there twice"
    return {row["sample_id"]: row for row in found}


def assert_equal_caches(output: Path, undisturbed: Config) -> None:
    assert verify(output).damaged == []
    for folder in (cache.priors_folder(undisturbed), cache.encodings_folder(undisturbed)):
        expected = Path(folder)
        place = output / expected.relative_to(undisturbed.cache.output)
        assert rows(place) == rows(expected)
        assert len(rows(place)) == NUM_CLIPS
    assert (place / EMPTY_PROMPT).read_bytes() == (expected / EMPTY_PROMPT).read_bytes()
    assert not file_names(output / "quarantine")


def test_a_killed_driver_and_a_killed_worker_cost_nothing(
    runs: Callable[[], Run], undisturbed: Config, tmp_path: Path
) -> None:
    output = tmp_path / "run" / "cache"
    priors, encodings = (
        output / "priors",
        output / Path(cache.encodings_folder(undisturbed)).relative_to(undisturbed.cache.output),
    )
    first = runs()
    first.wait_until(lambda: bool(file_names(priors)))
    first.kill("driver")
    done = set(file_names(priors))

    second = runs()
    second.wait_until(lambda: (encodings / EMPTY_PROMPT).exists())
    second.kill("worker")
    second.finish()
    assert done <= set(file_names(priors))  # nothing that was whole was made again
    assert_equal_caches(output, undisturbed)


@pytest.fixture(scope="module")
def usual_seconds(undisturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> float:
    start = time.monotonic()
    Run(tmp_path_factory.mktemp("usual") / "run", Path(undisturbed.cache.input)).finish()
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_costs_nothing(
    runs: Callable[[], Run], undisturbed: Config, usual_seconds: float, tmp_path: Path, trial: int
) -> None:
    random.seed(trial)
    first = runs()
    deadline = time.monotonic() + random.uniform(0, usual_seconds)
    first.wait_until(lambda: time.monotonic() > deadline or first.process.poll() is not None)
    first.kill(VICTIMS[trial % len(VICTIMS)])
    first.process.wait()
    runs().finish()
    assert_equal_caches(tmp_path / "run" / "cache", undisturbed)
