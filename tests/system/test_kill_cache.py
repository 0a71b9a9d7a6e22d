"""`prophy cache` killed with SIGKILL, driver, worker or all at once; then the same command again.

Real processes with Rays of their own. The cache that is left must hold the rows of an undisturbed run, each
once and equal to the last bit: clips go through the models one by one here, since a batch rounds as a whole.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.caching.tables import file_names
from pipelines.caching.verify import verify
from pipelines.config import Config
from prophy.schema import EMPTY_PROMPT
from tests.caches import encodings_folder, priors_folder
from tests.conftest import NUM_CLIPS, ROWS_PER_FILE
from tests.killing import Run, kill_at_a_moment, starter

OVERRIDES = (  # as the tiny cache
    f"cache.rows_per_file={ROWS_PER_FILE}",
    "cache.extract_batch_size=1",
    "cache.encode_batch_size=1",
)
VICTIMS = ("driver", "worker", "node")


def command(folder: Path, tiny_cache: Config) -> tuple[str, Path, tuple[str, ...], str]:
    """The arguments of `Run`."""
    return "cache", folder, (f"cache.input={tiny_cache.cache.input}", *OVERRIDES), "ray::Map"


@pytest.fixture
def runs(tiny_cache: Config, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Starts the same command, any number of times."""
    with starter(*command(tmp_path / "run", tiny_cache)) as start:
        yield start


def rows(folder: Path) -> dict[str, dict]:
    """All rows of a table, from its files by plain pyarrow."""
    found = [row for name in file_names(folder) for row in pq.read_table(folder / name).to_pylist()]
    assert len({row["sample_id"] for row in found}) == len(found), "a row is there twice"
    return {row["sample_id"]: row for row in found}


def assert_equal_caches(output: Path, tiny_cache: Config) -> None:
    assert verify(output) == []
    for folder in (priors_folder(tiny_cache), encodings_folder(tiny_cache)):
        expected = Path(folder)
        place = output / expected.relative_to(tiny_cache.cache.output)
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


def finish(run: Run, done: dict[str, int]) -> int:
    """Lets a run end that found these files; it asks the VLM of no clip that is in one of them.

    Returns:
        Of how many clips it asked the VLM, by the table that it prints where there were any.
    """
    printed = run.finish()
    stage = re.search(r"ExtractPriors\s+│\s+1\s+│\s+(\d+)", printed)
    num_asked = int(stage[1]) if stage else 0
    num_done = sum(num_rows for file, num_rows in done.items() if Path(file).parent.name == "priors")
    assert num_asked <= NUM_CLIPS - num_done, printed
    return num_asked


def test_a_killed_driver_and_worker_cost_nothing(
    runs: Callable[[], Run], tiny_cache: Config, tmp_path: Path
) -> None:
    output = tmp_path / "run" / "cache"
    first = runs()
    first.wait_until(lambda: bool(file_names(output / "priors")))
    first.kill("driver")
    done = whole_files(output)

    second = runs()
    encodings = output / encodings_folder(tiny_cache).relative_to(tiny_cache.cache.output)
    second.wait_until(lambda: bool(file_names(encodings)))
    assert second.kill("worker") == 1
    assert finish(second, done) > 0
    assert done.items() <= whole_files(output).items()
    assert_equal_caches(output, tiny_cache)


@pytest.fixture(scope="module")
def usual_seconds(tiny_cache: Config, tmp_path_factory: pytest.TempPathFactory) -> float:
    start = time.monotonic()
    Run(*command(tmp_path_factory.mktemp("usual") / "run", tiny_cache)).finish()
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_costs_nothing(
    runs: Callable[[], Run],
    tiny_cache: Config,
    usual_seconds: float,
    tmp_path: Path,
    trial: int,
    record_property: Callable[[str, object], None],
) -> None:
    random.seed(trial)
    victim, output = VICTIMS[trial % 3], tmp_path / "run" / "cache"
    first, killed, moment = kill_at_a_moment(runs, victim, usual_seconds)
    done = whole_files(output)
    first.process.wait()
    kept = whole_files(output)
    finish(runs(), kept)
    assert done.items() <= kept.items() <= whole_files(output).items()
    assert_equal_caches(output, tiny_cache)
    # For `--junit-xml`: who died, when, and how many of the 24 rows were whole by then.
    record_property("trial", f"{victim} ({killed}) after {moment:.1f} s: {sum(done.values())} rows whole")
