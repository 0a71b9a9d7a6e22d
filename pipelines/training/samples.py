"""Which cached samples a run trains on, and which it only measures. It knows no Ray and no torch."""

import hashlib
from collections.abc import Iterable

from pipelines.config import Config
from prophy.training.cache import PriorCache


def trained_on(config: Config, cache: PriorCache) -> set[str]:
    """The samples that are not held out."""
    return cache.shapes.keys() - held_out(cache.shapes, config.train.num_held_out)


def describe_samples(config: Config, cache: PriorCache) -> dict[str, int | str]:
    """Number and sha256 of the ids of the samples that a run trains on: they decide what each step draws."""
    sample_ids = sorted(trained_on(config, cache))
    return {
        "number": len(sample_ids),
        "sha256": hashlib.sha256("\n".join(sample_ids).encode()).hexdigest(),
    }


def held_out(sample_ids: Iterable[str], num_videos: int) -> set[str]:
    """All clips of the videos whose names, which are hashes, come first.

    So a video that was trained on stays so when others join the cache: what is held out then is new.
    """
    video_of = {sample_id: sample_id.partition("-")[0] for sample_id in sample_ids}
    chosen = sorted(set(video_of.values()))[:num_videos]
    return {sample_id for sample_id, video in video_of.items() if video in chosen}
