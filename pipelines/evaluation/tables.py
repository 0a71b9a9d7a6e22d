"""The scores of a comparison, as a Parquet table."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.caching.tables import writing

OUTPUT = "evaluate.output"
"""The key of the configuration that names the folder of a comparison."""

SCORES = pa.schema(
    [
        pa.field("measure", pa.string(), nullable=False),
        # Of what: a side, a law, a place, a phenomenon.
        pa.field("group", pa.string(), nullable=False),
        # The clip, pair, caption or prompt: what is resampled.
        pa.field("unit", pa.string(), nullable=False),
        # Level of noise, where it has one.
        pa.field("level", pa.float64()),
        pa.field("value", pa.float64(), nullable=False),
        # The same with the wrong caption or clip, where there is one.
        pa.field("wrong", pa.float64()),
    ]
)
"""A score. The table of a whole comparison has the column `contestant` too."""


def score(
    measure: str,
    group: str,
    unit: str,
    value: float,
    level: float | None = None,
    wrong: float | None = None,
) -> dict[str, Any]:
    """A row of `SCORES`."""
    return {
        "measure": measure,
        "group": group,
        "unit": unit,
        "level": level,
        "value": value,
        "wrong": wrong,
    }


def write_scores(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes scores as a Parquet file that is there in whole or not at all; raises as `whole_file`."""
    table = pa.Table.from_pylist(list(rows), SCORES)
    with whole_file(path) as partial:
        pq.write_table(table, partial)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and renames it to `path` where that went well.

    Raises:
        ProPhyError: the disk is full, or the folder cannot be written to.
    """
    partial = path.with_suffix(".partial")
    try:
        with writing(path.parent, OUTPUT):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
