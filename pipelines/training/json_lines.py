"""Files with a JSON object per line, to which a process that may be killed appends. Knows no torch."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, if there is one, without a line that a kill cut short."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(file)
