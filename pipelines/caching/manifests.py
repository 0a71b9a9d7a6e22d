"""Lists of videos: Parquet, CSV and JSON Lines with `path`, `caption`, `phenomena`; and WISA-80K's JSON.

A path is absolute, a URL, or relative to the list. `phenomena` are names of the taxonomy, as a list or as a
text separated by ';'; nothing says that they are unknown, an empty list or 'none' that there are none.
"""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.caching.video_files import find_files, source_of
from prophy.errors import ProPhyError
from prophy.taxonomy import PHENOMENA, parse_phenomena

logger = logging.getLogger(__name__)

Video = dict[str, Any]  # a row of `stages.SOURCES` without `done`

_NONE = "none"
# WISA-80K names what is seen in three answers, one per branch of physics, which may also be nothing.
_WISA_ANSWERS = ("q0", "q1", "q2")
_WISA_NOTHING = {f"no obvious {branch} phenomenon" for branch in ("dynamic", "thermodynamic", "optical")}


def read_manifest(location: str) -> list[Video]:
    """The videos of a list, in its order.

    Raises:
        ProPhyError: a kind of file that is no list, a damaged one, a missing column, an unknown phenomenon.
    """
    suffix = PurePosixPath(location).suffix.lower()
    if suffix not in _READERS:
        raise ProPhyError(
            f"{location} is no list of videos; give a folder, or a file that ends in {', '.join(_READERS)}"
        )
    with fsspec.open(location, "rb") as file:
        content = file.read()
    try:
        rows = _READERS[suffix](content)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ProPhyError(f"{location} cannot be read as {suffix}: {str(error).splitlines()[0]}") from None
    if suffix == ".json":
        return _wisa(rows, location)
    if any(not row.get("path") for row in rows):
        raise ProPhyError(f"{location} has no 'path' in each row; name each row's video there")
    return [
        {
            "source": source_of(_resolve(row["path"], location)),
            "caption": row.get("caption") or None,
            "labels": _labels(row.get("phenomena")),
        }
        for row in rows
    ]


def _read_parquet(content: bytes) -> list[dict[str, Any]]:
    file = pq.ParquetFile(pa.BufferReader(content))
    wanted = [name for name in ("path", "caption", "phenomena") if name in file.schema_arrow.names]
    return file.read(wanted).to_pylist()


def _read_csv(content: bytes) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    # An empty cell is an unknown one.
    return [{name: value or None for name, value in row.items()} for row in rows]


def _read_json_lines(content: bytes) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
    if strange := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{strange[0]!r} is no object with 'path'; each line must be one")
    return rows


def _read_json(content: bytes) -> list[dict[str, Any]]:
    records = json.loads(content)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("WISA-80K's JSON is a list of records")
    return records


_READERS: dict[str, Callable[[bytes], list[dict[str, Any]]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
}


def _labels(phenomena: list[str] | str | None) -> list[str] | None:
    if phenomena is None:
        return None
    names = phenomena.split(";") if isinstance(phenomena, str) else phenomena
    return list(parse_phenomena(name for name in names if name.strip().lower() != _NONE))


def _resolve(path: str, manifest: str) -> str:
    if "://" in path or path.startswith("/"):
        return path
    return f"{manifest.rpartition('/')[0]}/{path}"


def _wisa(records: list[dict[str, Any]], location: str) -> list[Video]:
    """Both layouts: answers in `physical_annotation` (training) or beside the caption (inference).

    A bare file name is looked for below the folder of the JSON: the archives of the data set unpack into
    folders of their own. What an answer names besides the taxonomy's phenomena is counted, said, and left
    out. The physical law is left out too: a user's prompt has none.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    if any("/" not in (record.get("file") or record.get("video_name") or "/") for record in records):
        for file in find_files(location.rpartition("/")[0]):
            by_name.setdefault(file["uri"].rpartition("/")[2], []).append(file)
    strange: Counter[str] = Counter()
    videos = []
    for number, record in enumerate(records):
        name = record.get("file") or record.get("video_name")
        if not name:
            raise ProPhyError(
                f"record {number} of {location} names no video; it needs 'file' or 'video_name'"
            )
        if "/" in name:
            source = source_of(_resolve(name, location))
        else:
            found = by_name.get(name) or [source_of(_resolve(name, location))]
            if len(found) > 1:
                raise ProPhyError(
                    f"{name!r} in {location} may be {found[0]['uri']} or {found[1]['uri']}; add its folder"
                )
            source = found[0]
        annotation = record.get("physical_annotation") or record
        said = [
            piece.strip().lower()
            for answer in _WISA_ANSWERS
            for piece in (annotation.get(answer) or "").split(",")
            if piece.strip()
        ]
        strange.update(piece for piece in said if piece not in PHENOMENA and piece not in _WISA_NOTHING)
        videos.append(
            {
                "source": source,
                "caption": record.get("captions") or record.get("en_caption") or None,
                "labels": list(parse_phenomena(piece for piece in said if piece in PHENOMENA))
                if said
                else None,
            }
        )
    if strange:
        logger.warning(
            "%s names %d times what is no phenomenon of the taxonomy, such as %r; left out",
            location,
            strange.total(),
            strange.most_common(1)[0][0],
        )
    return videos
