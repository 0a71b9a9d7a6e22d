"""Which videos there are, and what of them is left to do. Knows the tables, but neither Ray nor models."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.stages import CLIPS, SOURCES, clip_ids
from prophy.errors import ProPhyError
from prophy.taxonomy import parse_phenomena
from prophy.video import SUFFIXES

MANIFEST = "manifest.parquet"

Video = dict[str, Any]  # a row of `stages.SOURCES` without `done`


def find_videos(location: str) -> list[Video]:
    """The videos of a folder, or of a Parquet manifest, with their captions and labels where it has them.

    Args:
        location: a manifest with `path` (absolute, or relative to the manifest) and optionally `caption` and
            `phenomena`; or a folder that holds `manifest.parquet`; or one to search for videos, recursively.

    Raises:
        ProPhyError: no such place, not a manifest, an unknown phenomenon, or no videos.
    """
    place = Path(location).resolve()
    if not place.exists():
        raise ProPhyError(f"cache.input {location} does not exist; give a folder of videos or a manifest")
    manifest = place / MANIFEST if (place / MANIFEST).is_file() else place
    if manifest.is_file():
        videos = _read_manifest(manifest)
    else:
        files = sorted(
            file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        videos = [{"source": _source(file), "caption": None, "labels": None} for file in files]
    if not videos:
        raise ProPhyError(f"no videos in {location}; files that end in {', '.join(SUFFIXES)} count")
    return videos


def _read_manifest(manifest: Path) -> list[Video]:
    try:
        file = pq.ParquetFile(manifest)
    except pa.ArrowInvalid:
        raise ProPhyError(
            f"{manifest} is not Parquet; give a folder of videos or a Parquet manifest"
        ) from None
    columns = [name for name in ("path", "caption", "phenomena") if name in file.schema_arrow.names]
    if "path" not in columns:
        raise ProPhyError(f"{manifest} has no column 'path'; name each row's video there")
    return [
        {
            "source": _source(manifest.parent / row["path"]),
            "caption": row.get("caption") or None,
            "labels": None if row.get("phenomena") is None else list(parse_phenomena(row["phenomena"])),
        }
        for row in file.read(columns).to_pylist()
    ]


def _source(file: Path) -> dict[str, Any]:
    """This version of a file. A missing one has size 0, and goes to quarantine when a stage opens it."""
    if not file.exists():
        return {"uri": str(file), "size": 0, "modified": 0.0}
    status = file.stat()
    return {"uri": str(file), "size": status.st_size, "modified": status.st_mtime}


def of_videos(rows: pa.Table, videos: Iterable[Video]) -> pa.Table:
    """The rows of a table whose `source` is one of these videos, unchanged since."""
    current = {_key(video["source"]) for video in videos}
    return rows.filter(
        pa.array([_key(source) in current for source in rows["source"].to_pylist()], pa.bool_())
    )


def changed(rows: pa.Table, videos: Iterable[Video]) -> list[str]:
    """The samples in `rows` of videos that are another version now."""
    current = {video["source"]["uri"]: video["source"] for video in videos}
    return [
        sample_id
        for sample_id, source in zip(rows["sample_id"].to_pylist(), rows["source"].to_pylist(), strict=True)
        if current.get(source["uri"], source) != source
    ]


def videos_left(
    videos: list[Video], priors: pa.Table, quarantine: pa.Table, clip_duration_s: float
) -> pa.Table:
    """The videos that have clips without priors, as `stages.SOURCES`.

    Args:
        videos: of the input.
        priors: index of the priors.
        quarantine: what cannot be used: such clips and videos are left out while their file is the same.
        clip_duration_s: length of a clip.
    """
    known, unusable = _by_video(priors), _by_video(quarantine)
    left = []
    for video in videos:
        rows, refused = known[_key(video["source"])], unusable[_key(video["source"])]
        done = {row["sample_id"] for row in (*rows, *refused)}
        if rows:
            first = rows[0]
            duration_s = first["num_frames"] / first["fps"]
            num_clips = len(clip_ids(video["source"], first["content_hash"], duration_s, clip_duration_s))
        else:
            num_clips = max((row["num_clips"] or 0 for row in refused), default=1)
        if None not in done and len(done) < num_clips:
            left.append({**video, "done": sorted(done)})
    return pa.Table.from_pylist(left, SOURCES)


def clips_left(videos: list[Video], priors: pa.Table, encodings: pa.Table, quarantine: pa.Table) -> pa.Table:
    """The clips that have priors but no encodings, as `stages.CLIPS`; the VLM's caption where none was given.

    Args:
        videos: of the input.
        priors: index of the priors.
        encodings: index of the encodings.
        quarantine: what cannot be used.
    """
    done = {*encodings["sample_id"].to_pylist(), *quarantine["sample_id"].to_pylist()}
    current = {_key(video["source"]) for video in videos}
    left = [
        {**row, "caption": row["caption"] or row["vlm_caption"]}
        for row in priors.to_pylist()
        if row["sample_id"] not in done and _key(row["source"]) in current
    ]
    return pa.Table.from_pylist(left, CLIPS)


def _key(source: dict[str, Any]) -> tuple[str, int, float]:
    return source["uri"], source["size"], source["modified"]


def _by_video(rows: pa.Table) -> defaultdict[tuple[str, int, float], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows.to_pylist():
        found[_key(row["source"])].append(row)
    return found
