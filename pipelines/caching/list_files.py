"""The rows of a list of videos as they are written: Parquet, CSV, JSON Lines, or a JSON array of objects.

Text is UTF-8, or UTF-16 with its byte order mark; bytes that are not UTF-8 become lone surrogates in the row.
Columns are found whatever their case and the blanks around them. Knows no videos, nor what a column means.
"""

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a list.

    Attributes:
        number: counted from 1, without a header.
        line: where it begins in a text file, counted from 1.
        values: what known columns hold, by the name stripped and in lower case.
        error: why it cannot be read, in words that go for every such row.
        detail: what is wrong in this one.
    """

    number: int
    line: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Rows:
    """What a list holds.

    Attributes:
        rows: in the order of the file.
        columns: names as written, by the name stripped and in lower case.
        remark: what else the user should know of how the file was read.
    """

    rows: list[Row]
    columns: dict[str, str]
    remark: str | None = None


def read_rows(content: bytes, suffix: str, known: Collection[str]) -> Rows:
    """The rows of a list of videos.

    Args:
        content: bytes of the file.
        suffix: one of `SUFFIXES`.
        known: columns that may be used.

    Raises:
        ValueError: it is no such file, or has a known column twice.
    """
    try:
        return _READERS[suffix](content, known)
    except (pa.ArrowException, csv.Error, RecursionError) as error:
        raise ValueError(str(error)) from None


def _read_parquet(content: bytes, known: Collection[str]) -> Rows:
    file = pq.ParquetFile(pa.BufferReader(content))
    columns = _columns(file.schema_arrow.names, known)
    used = {name: written for name, written in columns.items() if name in known}
    table = file.read(list(used.values()))
    values = [_pylist(table[written]) for written in used.values()]
    rows = [
        Row(number, values=dict(zip(used, row, strict=True)))
        for number, row in enumerate(zip(*values, strict=True), 1)
    ]
    return Rows(rows, columns)


def _pylist(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; texts as bytes, which need not be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _read_csv(content: bytes, known: Collection[str]) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a caption may be long
    text = _text(content)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((sign for sign in _DELIMITERS if "path" in _names(first, sign)), ",")
    written = next(csv.reader([first], delimiter=delimiter), [])
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        # Who writes a blank after each comma of the header writes one in the rows too, before quotes as well.
        skipinitialspace=any(name != name.lstrip() for name in written[1:]),
    )
    header, used = None, list[tuple[int, str]]()
    rows: list[Row] = []
    line = 1
    try:
        for cells in reader:
            begins, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = cells
                used = [(place, name) for place, name in enumerate(map(_plain, cells)) if name in known]
                continue
            error, detail = None, ""
            if len(cells) != len(header):
                error = f"it has not as many cells as the header; quote a text that holds {delimiter!r}"
                detail = f"{len(cells)} for {len(header)}"
            values = {name: cells[place] or None for place, name in used if place < len(cells)}
            rows.append(Row(len(rows) + 1, begins, values, error, detail))
    except csv.Error as error:
        raise ValueError(
            f"the row that begins in line {line} has a quote that does not end, or ends too early; write a "
            f"quote inside a quoted text twice ({error})"
        ) from None
    remark = None if delimiter == "," else f"its cells are separated by {_DELIMITERS[delimiter]}"
    return Rows(rows, _columns(header or [], known), remark)


def _names(line: str, delimiter: str) -> set[str]:
    return set(map(_plain, next(csv.reader([line], delimiter=delimiter), [])))


class _Object(dict[str, Any]):
    """A JSON object that remembers names which it has twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _read_json(content: bytes, known: Collection[str]) -> Rows:
    text = _text(content)
    columns: dict[str, str] = {}
    if text.lstrip().startswith("["):
        records = json.loads(text, object_pairs_hook=_Object)
        rows = [_json_row(Row(number), record, known, columns) for number, record in enumerate(records, 1)]
        return Rows(rows, columns)
    rows = []
    # Not `splitlines`: it cuts at what Unicode calls a line separator too, which JSON may have inside a text.
    for line, written in enumerate(io.StringIO(text, newline="\n"), 1):
        written = written.removesuffix("\n")
        if not written.strip():
            continue
        row = Row(len(rows) + 1, line)
        try:
            record = json.loads(written, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            rows.append(replace(row, error="it is no JSON object", detail=str(error)))
        else:
            rows.append(_json_row(row, record, known, columns))
    if rows and not columns:
        raise ValueError("none of its lines is a JSON object, and the whole is no array of objects")
    return Rows(rows, columns)


def _json_row(row: Row, record: Any, known: Collection[str], columns: dict[str, str]) -> Row:
    if not isinstance(record, _Object):
        return replace(row, error="it is no JSON object, but each row must be one")
    values: dict[str, Any] = {}
    for written in record.names:
        name = _plain(written)
        if name in known and name in values:
            return replace(row, error=f"it has {name!r} twice; keep one")
        columns.setdefault(name, written)
        if name in known:
            values[name] = record[written]
    return replace(row, values=values)


def _text(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig", "surrogateescape")


def _columns(written: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The columns of a header, by plain name."""
    columns: dict[str, str] = {}
    for name in written:
        if columns.setdefault(_plain(name), name) is not name and _plain(name) in known:
            raise ValueError(f"it has the column {_plain(name)!r} twice; keep one")
    return columns


def _plain(name: str) -> str:
    return name.strip().lower()


_READERS: dict[str, Callable[[bytes, Collection[str]], Rows]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}
SUFFIXES = tuple(_READERS)
