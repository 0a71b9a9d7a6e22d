"""`prophy evaluate` killed with SIGKILL; then the same command again.

The scores that are left must be those of an undisturbed run, and nothing whole is made twice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.killing import Run, starter

pytestmark = pytest.mark.slow

OVERRIDES = (
    "evaluate.num_clips=24",
    "evaluate.noise_levels=[0.9]",
    "evaluate.measures=[loss]",
    "evaluate.pool.size=1",
    "evaluate.contestants={without: {checkpoint: tiny, scale: 0}}",
)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[[], Run]]:
    with starter("evaluate", tmp_path / "run", OVERRIDES, "ray::Map") as start:
        yield start


def scores(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "evaluation" / "scores.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["unit"], row["group"]))


def whole(folder: Path) -> dict[Path, int]:
    """When each whole file was written, in nanoseconds."""
    found = [*folder.glob("evaluation/scores/*.parquet"), *folder.glob("evaluation/encodings/*.safetensors")]
    return {path: path.stat().st_mtime_ns for path in found}


def test_a_killed_driver_costs_no_whole_file(runs: Callable[[], Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = runs()
    first.wait_until(lambda: bool(list(folder.glob("evaluation/scores/*.parquet"))))
    first.kill("node")
    first.process.wait()
    done = whole(folder)
    assert sum(path.suffix == ".parquet" for path in done) < 3, "it was killed before its end"
    assert not (folder / "evaluation" / "scores.parquet").exists()

    runs().finish()
    assert done.items() <= whole(folder).items()
    found = scores(folder)
    assert len({row["unit"] for row in found}) == 24
    assert len({(row["unit"], row["group"]) for row in found}) == len(found)
