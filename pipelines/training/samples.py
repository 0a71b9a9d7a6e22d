"""Which cached samples a run trains on, and which it only measures. It knows no Ray and no torch."""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Config
from prophy.training.cache import PriorCache


def trained_on(config: Config, cache: PriorCache) -> pa.Array:
    """The samples that are not held out, in order."""
    held = held_out(cache.sample_ids, config.train.num_held_out)
    return cache.sample_ids.filter(pc.invert(pc.is_in(cache.sample_ids, held)))


def describe_samples(config: Config, cache: PriorCache) -> dict[str, int | str]:
    """Number and sha256 of the ids of the samples that a run trains on: they decide what each step draws."""
    sample_ids = trained_on(config, cache)
    return {"number": len(sample_ids), "sha256": _sha256(sample_ids)}


def describe_held_out(config: Config, cache: PriorCache) -> str | None:
    """sha256 of the ids of the samples that are held out, if any are: losses of others do not compare."""
    if not config.train.num_held_out:
        return None
    return _sha256(held_out(cache.sample_ids, config.train.num_held_out))


def held_out(sample_ids: pa.Array, num_videos: int) -> pa.Array:
    """All clips of the videos whose names, which are hashes, come first.

    So a video that was trained on stays so when others join the cache: what is held out then is new.
    """
    videos = videos_of(sample_ids)
    return sample_ids.filter(pc.is_in(videos, videos.unique().sort()[:num_videos]))


def held_out_videos(config: Config, cache: PriorCache) -> list[str]:
    """The names of the videos that a run holds out."""
    return videos_of(held_out(cache.sample_ids, config.train.num_held_out)).unique().to_pylist()


def _sha256(sample_ids: pa.Array) -> str:
    [lines] = pc.binary_join(pa.ListArray.from_arrays([0, len(sample_ids)], sample_ids), "\n")
    return hashlib.sha256(lines.as_buffer()).hexdigest()


def videos_of(sample_ids: pa.Array) -> pa.Array:
    """The name of each sample's video, with which its own begins."""
    return pc.replace_substring_regex(sample_ids, "-.*", "")
