"""Which videos there are, and what of them is left to do. Knows the tables, but neither Ray nor models."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.caching.manifests import Input, Video, read_manifest
from pipelines.caching.stages import CLIPS, SOURCES, clip_ids
from pipelines.caching.video_files import UNREADABLE, asking, find_files, once_each, open_store
from prophy.errors import ProPhyError
from prophy.schema import MANIFEST, CacheInput, source_version
from prophy.video import SUFFIXES

logger = logging.getLogger(__name__)


def find_videos(location: str, names: Sequence[str]) -> Input:
    """The videos of a folder, an object-store prefix or a list, with captions and labels where there are any.

    What is left out of them, and why, is logged.

    Args:
        location: a list of videos (`pipelines.caching.manifests`); a folder or prefix that holds
            `manifest.parquet`; or one to search for videos, recursively. A path, or a URL such as `s3://bucket/videos`.
        names: the taxonomy's, which labels are checked against.

    Raises:
        ProPhyError: no such place, one that does not let us in, a list that cannot be used, or no videos.
    """
    try:
        with asking(location):
            found = _listed(location, names)
    except OSError as error:
        raise ProPhyError(f"cannot read cache.input: {error}") from None
    videos = [video for video in found.videos if not _is_resource_fork(video)]
    if number := len(found.videos) - len(videos):
        logger.warning("left out %d file(s) named ._*, in which macOS keeps what is no video", number)
    places = once_each([video["source"] for video in videos])
    if number := len(videos) - len(places):
        logger.warning(
            "left out %d video(s) that are named twice, or linked to others: the first counts", number
        )
    if not videos:
        raise ProPhyError(
            f"none of what {location} holds can be used; the first: {found.refused[0]}"
            if found.refused
            else f"no videos in {location}; files that end in {', '.join(SUFFIXES)} count"
        )
    if found.refused:
        logger.warning("%s; what else cannot be used is told at the end", found.refused[0])
    return Input([videos[place] for place in places], found.refused)


def _listed(location: str, names: Sequence[str]) -> Input:
    store, path = open_store(location)
    if not store.exists(path):
        raise ProPhyError(f"cache.input {location} does not exist; give a folder of videos or a list of them")
    if store.isfile(path):
        return read_manifest(location, names)
    if store.isfile(f"{path}/{MANIFEST}"):
        manifest = f"{location.rstrip('/')}/{MANIFEST}"
        logger.info("the videos are those of %s, which the folder holds", manifest)
        return read_manifest(manifest, names)
    found = find_files(location)
    if found.left_out:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(found.left_out.items()))
        logger.warning("left out files of %s that are no videos by their ending: %s", location, kinds)
    return Input(
        [{"source": source, "caption": None, "labels": None} for source in found.sources], found.refused
    )


def _is_resource_fork(video: Video) -> bool:
    return video["source"]["uri"].rpartition("/")[2].startswith("._")


def of_videos(rows: pa.Table, videos: Iterable[Video]) -> pa.Table:
    """The rows of a table whose `source` is one of these videos, unchanged since."""
    return _of_sources(rows, [video["source"] for video in videos])


def refusals(quarantine: pa.Table, videos: Iterable[Video], left: Iterable[pa.Table]) -> list[str]:
    """Why a video or clip of the input cannot be used, a sentence each.

    Args:
        quarantine: what cannot be used.
        videos: the input's.
        left: what a run left of its work lists: files that it could not have, though they are there.
    """
    unreadable = [
        {"uri": source["uri"], **UNREADABLE} for table in left for source in table["source"].to_pylist()
    ]
    rows = _of_sources(quarantine, [*(video["source"] for video in videos), *unreadable])
    return rows["message"].unique().to_pylist()


def changed(rows: pa.Table, videos: Iterable[Video], columns: Iterable[str] = ("source",)) -> list[str]:
    """The samples in `rows` whose video has other `columns` now; those of a missing video stay."""
    current = {video["source"]["uri"]: video for video in videos if video["source"]["modified"]}
    return [
        row["sample_id"]
        for row in rows.select(["sample_id", *columns]).to_pylist()
        if any(current.get(row["source"]["uri"], row)[column] != row[column] for column in columns)
    ]


def videos_left(
    videos: list[Video], priors: pa.Table, quarantine: pa.Table, clip_durations_s: list[float]
) -> pa.Table:
    """The videos that have clips without priors, as `stages.SOURCES`.

    Args:
        videos: the input's.
        priors: index of the priors.
        quarantine: what cannot be used: such clips and videos are left out while their file is the same.
        clip_durations_s: lengths that a clip may have.
    """
    known = _by_video(priors, ["content_hash", "num_frames", "fps"])
    unusable = _by_video(quarantine, ["num_clips"])
    left = []
    for video in videos:
        rows, refused = known[source_version(video["source"])], unusable[source_version(video["source"])]
        done = {row["sample_id"] for row in (*rows, *refused)}
        if rows:
            first = rows[0]
            duration_s = first["num_frames"] / first["fps"]
            num_clips = len(clip_ids(video["source"], first["content_hash"], duration_s, clip_durations_s))
        else:
            num_clips = max((row["num_clips"] or 0 for row in refused), default=1)
        if None not in done and len(done) < num_clips:
            left.append({**video, "done": sorted(done)})
    return pa.Table.from_pylist(left, SOURCES)


def clips_left(videos: list[Video], priors: pa.Table, encodings: pa.Table, quarantine: pa.Table) -> pa.Table:
    """The clips with priors but without encodings of their caption, as `stages.CLIPS`.

    The caption is the VLM's where none was given.

    Args:
        videos: the input's.
        priors: index of the priors.
        encodings: index of the encodings.
        quarantine: what cannot be used.
    """
    done = dict(zip(*encodings.select(["sample_id", "caption"]).to_pydict().values(), strict=True))
    refused = set(quarantine["sample_id"].to_pylist())
    columns = [name for name in priors.column_names if name in (*CLIPS.names, "vlm_caption")]
    usable = [row for row in priors.select(columns).to_pylist() if row["sample_id"] not in refused]
    current = set(CacheInput("", [video["source"] for video in videos]).samples(usable))
    clips = [
        {**row, "caption": row["caption"] or row["vlm_caption"], "share": 1.0}
        for row in usable
        if row["sample_id"] in current
    ]
    left = [clip for clip in clips if done.get(clip["sample_id"]) != clip["caption"]]
    return pa.Table.from_pylist(left, CLIPS)


def _of_sources(rows: pa.Table, sources: Iterable[dict[str, Any]]) -> pa.Table:
    current = set(map(source_version, sources))
    return rows.filter(
        pa.array([source_version(source) in current for source in rows["source"].to_pylist()], pa.bool_())
    )


def _by_video(
    rows: pa.Table, columns: list[str]
) -> defaultdict[tuple[str, int, float], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows.select(["sample_id", "source", *columns]).to_pylist():
        found[source_version(row["source"])].append(row)
    return found
