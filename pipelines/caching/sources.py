"""Which videos there are, and what of them is left to do. Knows the tables, but neither Ray nor models."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.caching.manifests import VIDEOS, Input, read_manifest
from pipelines.caching.stages import CLIPS, SOURCES
from pipelines.caching.video_files import UNREADABLE, find_files, once_each
from prophy.errors import ProPhyError
from prophy.schema import MANIFEST, PRIORS, CacheInput
from prophy.stores import asking, open_store
from prophy.video import SUFFIXES, clip_spans

logger = logging.getLogger(__name__)

# Of the index of the priors, what says which work is left: all but what the VLM made beside the caption.
PLANNED = PRIORS.names[: PRIORS.get_field_index("vlm_caption") + 1]
_RESOURCE_FORK = r"(^|/)\._[^/]*$"  # a file that is named so


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
    videos = found.videos.filter(pc.invert(pc.match_substring_regex(_uris(found.videos), _RESOURCE_FORK)))
    if number := len(found.videos) - len(videos):
        logger.warning("left out %d file(s) named ._*, in which macOS keeps what is no video", number)
    places = once_each(videos["source"])
    if number := len(videos) - len(places):
        logger.warning(
            "left out %d video(s) that are named twice, or linked to others: the first counts", number
        )
    if not len(videos):
        raise ProPhyError(
            f"none of what {location} holds can be used; the first: {found.refused[0]}"
            if found.refused
            else f"no videos in {location}; files that end in {', '.join(SUFFIXES)} count"
        )
    if found.refused:
        logger.warning("%s; what else cannot be used is told at the end", found.refused[0])
    return Input(videos.take(places), found.refused)


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
    unsaid = (pa.nulls(len(found.sources), VIDEOS.field(name).type) for name in ("caption", "labels"))
    return Input(pa.table([found.sources, *unsaid], schema=VIDEOS), found.refused)


def of_videos(rows: pa.Table, videos: pa.Table) -> pa.Table:
    """The rows of a table whose `source` is one of these videos, unchanged since."""
    return rows.filter(_places(rows, videos).is_valid())


def refusals(quarantine: pa.Table, videos: pa.Table, left: Iterable[pa.Table]) -> list[str]:
    """Why a video or clip of the input cannot be used, a sentence each.

    Args:
        quarantine: what cannot be used.
        videos: the input's, as `VIDEOS`.
        left: what a run left of its work lists: files that it could not have, though they are there.
    """
    source = quarantine["source"]
    is_unreadable = pc.and_(*(pc.equal(pc.struct_field(source, key), UNREADABLE[key]) for key in UNREADABLE))
    told = _places(quarantine, videos).is_valid()
    for table in left:
        told = pc.or_(told, pc.and_(is_unreadable, pc.is_in(_uris(quarantine), _uris(table))))
    return quarantine["message"].filter(told).unique().to_pylist()


def changed(rows: pa.Table, videos: pa.Table, columns: Iterable[str] = ()) -> pa.ChunkedArray:
    """The samples in `rows` whose video has another file or other `columns` now; a missing one's stay."""
    videos = videos.filter(pc.not_equal(pc.struct_field(videos["source"], "modified"), 0.0))
    place = pc.index_in(_uris(rows), value_set=_uris(videos))
    differs = _places(rows, videos).is_null()
    for column in columns:
        now, before = videos[column].take(place), rows[column]
        if pa.types.is_list(before.type):  # of names, as a text that can be compared
            now, before = pc.binary_join(now, "\n"), pc.binary_join(before, "\n")
        one_is_null = pc.xor(now.is_null(), before.is_null())
        differs = pc.or_(differs, pc.coalesce(pc.not_equal(now, before), one_is_null))
    return rows["sample_id"].filter(pc.and_(place.is_valid(), differs))


def videos_left(
    videos: pa.Table, priors: pa.Table, quarantine: pa.Table, clip_durations_s: list[float]
) -> pa.Table:
    """The videos that have clips without priors, as `stages.SOURCES`.

    Args:
        videos: the input's, as `VIDEOS`.
        priors: index of the priors.
        quarantine: what cannot be used: such clips and videos are left out while their file is the same.
        clip_durations_s: lengths that a clip may have.
    """
    known = _with_places(priors, videos, ["sample_id", "num_frames", "fps"])
    refused = _with_places(quarantine, videos, ["sample_id", "num_clips"])
    others = refused.filter(pc.invert(pc.is_in(refused["sample_id"], known["sample_id"])))
    others = others.group_by(["place", "sample_id"]).aggregate([])
    done = pa.concat_tables([known.select(["place", "sample_id"]), others])
    num_done = np.bincount(done["place"].to_numpy(), minlength=len(videos))
    # How many clips a video has says its file; of one that has no priors yet, what was refused of it.
    num_clips = np.ones(len(videos), int)
    num_clips[refused["place"].to_numpy()] = 0
    np.maximum.at(num_clips, refused["place"].to_numpy(), refused["num_clips"].fill_null(0).to_numpy())
    durations_s = pc.divide(known["num_frames"], known["fps"]).combine_chunks().dictionary_encode()
    counts = [len(clip_spans(each, clip_durations_s)) for each in durations_s.dictionary.to_pylist()]
    num_clips[known["place"].to_numpy()] = np.array(counts, int)[durations_s.indices.to_numpy()]
    num_clips[refused["place"].filter(refused["sample_id"].is_null()).to_numpy()] = 0  # refused as a whole
    is_left = num_done < num_clips
    done = done.filter(pa.array(is_left[done["place"].to_numpy()]))
    done = done.sort_by([("place", "ascending"), ("sample_id", "ascending")])
    ends = pa.array(np.append(0, num_done[is_left]).cumsum(), pa.int32())
    lists = pa.ListArray.from_arrays(ends, done["sample_id"].combine_chunks())
    return videos.filter(pa.array(is_left)).append_column("done", lists).cast(SOURCES)


def clips_left(videos: pa.Table, priors: pa.Table, encodings: pa.Table, quarantine: pa.Table) -> pa.Table:
    """The clips with priors but without encodings of their caption, as `stages.CLIPS`.

    The caption is the VLM's where none was given.

    Args:
        videos: the input's, as `VIDEOS`.
        priors: index of the priors.
        encodings: index of the encodings.
        quarantine: what cannot be used.
    """
    sample_ids, given = priors["sample_id"], priors["caption"]
    is_refused = pc.is_in(sample_ids, quarantine["sample_id"].drop_null())
    usable = priors.select(["sample_id", "source", "content_hash", "start_s", "end_s"])
    if pc.any(is_refused).as_py():
        usable = usable.filter(pc.invert(is_refused))
    current = CacheInput("", videos["source"]).samples(usable)
    captions = pc.if_else(pc.equal(given.fill_null(""), ""), priors["vlm_caption"], given)
    encoded = encodings["caption"].take(pc.index_in(sample_ids, value_set=encodings["sample_id"]))
    is_left = pc.and_(pc.is_in(sample_ids, current), pc.not_equal(encoded, captions).fill_null(True))
    clips = priors.set_column(priors.column_names.index("caption"), "caption", captions).filter(is_left)
    clips = clips.append_column("share", pa.array(np.ones(len(clips))))
    columns = [
        clips[field.name] if field.name in clips.column_names else pa.nulls(len(clips), field.type)
        for field in CLIPS
    ]
    return pa.table(columns, schema=CLIPS)


def _places(rows: pa.Table, videos: pa.Table) -> pa.ChunkedArray:
    """The place of each row's video in `videos`; null where it is not there, or its file has changed."""
    return CacheInput("", videos["source"]).places(rows["source"])


def _with_places(rows: pa.Table, videos: pa.Table, columns: list[str]) -> pa.Table:
    """The rows that are of `videos`, with their `place` there."""
    places = _places(rows, videos)
    found = pa.table({"place": places, **{name: rows[name] for name in columns}})
    return found.filter(places.is_valid())


def _uris(rows: pa.Table) -> pa.ChunkedArray:
    return pc.struct_field(rows["source"], "uri")
