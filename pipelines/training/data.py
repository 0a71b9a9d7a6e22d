"""Which cached samples a run trains on, and which it only measures. It knows no Ray."""

import hashlib
from collections.abc import Iterable

from pipelines.config import Config
from pipelines.training.model import clip_shape
from prophy.errors import ProPhyError
from prophy.training.data import BatchPlan, PriorCache, PriorDataset


def build_dataset(config: Config, cache: PriorCache, rank: int) -> PriorDataset:
    """The share of worker `rank` in the cached samples, without those that are held out.

    Raises:
        ProPhyError: the cache does not fit the configuration, or all of it is held out.
    """
    train, shapes = config.train, cache.shapes
    kept = trained_on(config, cache)
    if not kept:
        raise ProPhyError(
            f"train.num_held_out ({train.num_held_out}) leaves no video to train on; lower it, or cache more"
        )
    plan = BatchPlan({key: shapes[key] for key in kept}, train.global_batch_size, train.seed)
    return _dataset(
        config, cache, plan, rank, train.num_workers, train.micro_batch_size, train.caption_dropout
    )


def build_held_out_dataset(config: Config, cache: PriorCache) -> tuple[PriorDataset, int]:
    """The held-out samples one by one, always with the same noise and their captions; and how many."""
    shapes = cache.shapes
    samples = held_out(shapes, config.train.num_held_out)
    plan = BatchPlan({key: shapes[key] for key in samples}, 1, config.train.seed)
    return _dataset(config, cache, plan, 0, 1, 1, caption_dropout=0.0), len(samples)


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


def _dataset(
    config: Config,
    cache: PriorCache,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    caption_dropout: float,
) -> PriorDataset:
    train, backbone = config.train, config.backbone
    return PriorDataset(
        cache,
        plan,
        [
            clip_shape(
                backbone.model_copy(update={"num_frames": num_frames, "height": height, "width": width})
            )
            for _, num_frames in config.clip_lengths
            for height, width in backbone.frame_shapes
        ],
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        recipe=train.recipe,
        negatives=train.negatives,
        caption_dropout=caption_dropout,
        seed=train.seed,
    )
