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

NUM_CLIPS = 6  # two rows each
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

    def kill(self, victim: str) -> int:
        """SIGKILL to the driver, to one of the workers that hold rows, or to the whole node.

        The node is the driver with its Ray: raylet, GCS, dashboard and all workers.

        Returns:
            How many processes were killed; early in a run there is no worker yet.
        """
        self.family |= set(self.process.children(recursive=True))
        victims = [self.process]
        if victim == "node":
            victims += self.family
        if victim == "worker":
            victims = [random.choice(workers)] if (workers := [*filter(is_worker, self.family)]) else []
        for process in victims:
            kill(process)
        return len(victims)

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


def whole_files(output: Path) -> dict[str, int]:
    """Rows of each file of priors and encodings; what was whole once must not be made again."""
    files = [
        file for place in ("priors", "encodings/*") for file in output.glob(f"{place}/*[0-9a-f].parquet")
    ]
    return {str(file): pq.read_metadata(file).num_rows for file in files}


def test_a_killed_driver_node_and_worker_cost_nothing(
    runs: Callable[[], Run], undisturbed: Config, tmp_path: Path
) -> None:
    output = tmp_path / "run" / "cache"
    encodings = output / Path(cache.encodings_folder(undisturbed)).relative_to(undisturbed.cache.output)
    first = runs()
    first.wait_until(lambda: bool(file_names(output / "priors")))
    first.kill("driver")
    done = whole_files(output)

    second = runs()
    second.wait_until(lambda: (encodings / EMPTY_PROMPT).exists())
    assert second.kill("node") > 10
    assert done.items() <= whole_files(output).items()
    done = whole_files(output)

    third = runs()
    third.wait_until(lambda: bool(file_names(encodings)))
    assert third.kill("worker") == 1
    third.finish()
    assert done.items() <= whole_files(output).items()
    assert_equal_caches(output, undisturbed)


@pytest.fixture(scope="module")
def usual_seconds(undisturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> float:
    start = time.monotonic()
    Run(tmp_path_factory.mktemp("usual") / "run", Path(undisturbed.cache.input)).finish()
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_costs_nothing(
    runs: Callable[[], Run],
    undisturbed: Config,
    usual_seconds: float,
    tmp_path: Path,
    trial: int,
    record_property: Callable[[str, object], None],
) -> None:
    random.seed(trial)
    victim, moment, output = VICTIMS[trial % 3], random.uniform(0, usual_seconds), tmp_path / "run" / "cache"
    first = runs()
    deadline = time.monotonic() + moment
    first.wait_until(lambda: time.monotonic() > deadline or first.process.poll() is not None)
    killed = first.kill(victim)
    done = whole_files(output)
    first.process.wait()
    kept = whole_files(output)
    runs().finish()
    assert done.items() <= kept.items() <= whole_files(output).items()
    assert_equal_caches(output, undisturbed)
    # For `--junit-xml`: who died, when, and how many of the 12 rows were whole by then.
    record_property("trial", f"{victim} ({killed}) after {moment:.1f} s: {sum(done.values())} rows whole")
