"""The scores of a comparison, as a Parquet table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    """Writes scores as a Parquet file that is there in whole or not at all."""
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(rows), SCORES), partial)
    partial.rename(path)
