"""The batches of a run: those that it trains on, and those that it only measures. It knows no Ray."""

from collections.abc import Iterator, Mapping
from math import prod

from torch.utils.data import DataLoader, Dataset

from pipelines.config import BackboneConfig, Config
from pipelines.training.samples import held_out, trained_on
from prophy.backbones.families import FAMILIES, Family, ModelConfig
from prophy.backbones.pretrained import load_configs, takes_images
from prophy.errors import ProPhyError
from prophy.training.cache import PriorCache
from prophy.training.data import BatchPlan, ClipShape, PriorDataset, SemanticBatch, TrainBatch

_IMAGE_SHARE = 0.5  # where the configuration does not say; how TI2V was trained is not published

Step = tuple[list[TrainBatch], SemanticBatch]
"""What a rank trains on in a step: the micro-batches, and all their captions."""


def build_dataset(config: Config, cache: PriorCache, rank: int) -> PriorDataset:
    """The samples of worker `rank`, and of those that share them with it, of the cached ones.

    Those that are held out are none of them.

    Raises:
        ProPhyError: the cache does not fit the configuration, or all of it is held out.
    """
    train, kept = config.train, trained_on(config, cache)
    if not len(kept):
        raise ProPhyError(
            f"train.num_held_out ({train.num_held_out}) leaves no video to train on; lower it, or cache more"
        )
    plan = BatchPlan(cache.by_shape(kept), train.global_batch_size, train.seed)
    return _dataset(
        config,
        cache,
        plan,
        rank // train.sequence_parallel,
        train.data_parallel_size,
        train.micro_batch_size,
        train.caption_dropout,
    )


def build_held_out_dataset(config: Config, cache: PriorCache) -> tuple[PriorDataset, int]:
    """The held-out samples one by one, always with the same noise and their captions; and how many."""
    held = held_out(cache.sample_ids, config.train.num_held_out)
    plan = BatchPlan(cache.by_shape(held), 1, config.train.seed)
    return _dataset(config, cache, plan, 0, 1, 1, caption_dropout=0.0), len(held)


class _Mistakes(Dataset[Step | ProPhyError]):
    """A dataset whose mistakes are items: torch would add the traceback of its process to their sentence."""

    def __init__(self, dataset: Dataset[Step]) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Step | ProPhyError:
        try:
            return self.dataset[step]
        except ProPhyError as error:
            return error


def read_ahead(dataset: Dataset[Step], steps: range) -> Iterator[Step]:
    """The items of these steps, which a process of its own reads.

    Raises:
        ProPhyError: what reading one raises.
    """
    for item in DataLoader(_Mistakes(dataset), batch_size=None, sampler=steps, num_workers=1):
        if isinstance(item, ProPhyError):
            raise item
        yield item


def clip_shape(backbone: BackboneConfig, num_frames: int, height: int, width: int) -> ClipShape:
    """A clip in pixels, as the backbone has it; of the backbone only configuration files are read.

    Raises:
        ProPhyError: the VAE or the patches do not fit clips of this length or size.
    """
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    return _shape_of(FAMILIES[backbone.family], vae, transformer, (num_frames, height, width))


def clip_shapes(config: Config) -> list[ClipShape]:
    """Every shape that a clip of this run may have."""
    backbone = config.backbone
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    return [*shapes_by_clip(config, vae, transformer).values()]


def shapes_by_clip(
    config: Config, vae: ModelConfig, transformer: ModelConfig
) -> dict[tuple[int, int, int], ClipShape]:
    """Every shape that a clip of this run may have, by its frames, height and width in pixels.

    Args:
        config: the run's.
        vae: the VAE's configuration.
        transformer: the transformer's.

    Raises:
        ProPhyError: as `clip_shape`.
    """
    family = FAMILIES[config.backbone.family]
    clips = [
        (num_frames, *frame_shape)
        for _, num_frames in config.clip_lengths
        for frame_shape in config.backbone.frame_shapes
    ]
    return {clip: _shape_of(family, vae, transformer, clip) for clip in clips}


def _shape_of(
    family: Family, vae: ModelConfig, transformer: ModelConfig, clip: tuple[int, int, int]
) -> ClipShape:
    size = family.latent_shape(*clip, vae, transformer)
    return ClipShape(
        num_frames=clip[0],
        latents=(family.latent_channels(transformer), *size),
        token_grid=family.token_grid(size, transformer),
    )


def check_sharing(config: Config) -> None:
    """Checks that `train.sequence_parallel` workers can share every clip of a run.

    Raises:
        ProPhyError: as `sharing_sizes`.
    """
    backbone = config.backbone
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    sharing_sizes(config, transformer, shapes_by_clip(config, vae, transformer))


def sharing_sizes(
    config: Config, transformer: ModelConfig, shapes: Mapping[tuple[int, int, int], ClipShape]
) -> list[int]:
    """How many workers may share a clip: divisors of `train.num_workers`, 1 the first.

    Args:
        config: the run's.
        transformer: the backbone's configuration.
        shapes: see `shapes_by_clip`.

    Raises:
        ProPhyError: `train.sequence_parallel` is none of them; or blocks shall be compiled, and torch.compile
            cannot trace the backward pass of diffusers' attention among processes.
    """
    train, backbone, wanted = config.train, config.backbone, config.train.sequence_parallel
    compiled = backbone.compile != "none"
    if wanted > 1 and compiled:
        raise ProPhyError(
            f"backbone.compile is {backbone.compile!r}, and attention that workers share "
            f"(train.sequence_parallel, {wanted}) cannot be compiled; set one to 'none', or the other to 1"
        )
    family, length = FAMILIES[backbone.family], backbone.max_sequence_length
    counts = {clip: prod(shape.token_grid) for clip, shape in shapes.items()}
    divisors = [size for size in range(1, train.num_workers + 1) if train.num_workers % size == 0]
    sizes = [
        size
        for size in divisors
        if not any(family.unshareable(size, count, length, transformer) for count in counts.values())
    ]
    if wanted not in sizes:
        refused = f"train.sequence_parallel is {wanted}, and so many workers"
        mend = f"set it to {' or '.join(map(str, sizes))}"
        if reason := family.unshareable(wanted, 0, length, transformer):  # whatever the clip
            raise ProPhyError(f"{refused} {reason}; {mend}")
        odd = {clip: count for clip, count in counts.items() if count % wanted}
        (num_frames, height, width), count = next(iter(odd.items()))
        key = "height and backbone.width" if backbone.aspect_buckets is None else "aspect_buckets"
        names = ", ".join(dict.fromkeys(f"{height}x{width}" for _, height, width in odd))
        raise ProPhyError(
            f"{refused} cannot share out the {count} tokens of a clip of {num_frames} frames of "
            f"{height}x{width}; {mend}, or change {names} in backbone.{key}"
        )
    return [1] if compiled else sizes


def image_share(config: Config) -> float:
    """The share of samples whose first latent frame is given.

    Raises:
        ProPhyError: the configuration names one, and the backbone takes no images, or always; or it names
            prompts of samples where the backbone always takes an image.
    """
    backbone, share = config.backbone, config.train.image_share
    images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
    if images == "always":
        if share is not None:
            raise ProPhyError(
                f"train.image_share is {share:g}, but {backbone.pretrained} always takes an image; set it to "
                f"null"
            )
        if config.train.sample_prompts:
            raise ProPhyError(
                f"train.sample_prompts become videos of text alone, and {backbone.pretrained} always takes "
                f"an image; set them to []"
            )
        return 0.0
    if images == "never":
        if share:
            raise ProPhyError(
                f"train.image_share is {share:g}, but {backbone.pretrained} takes no images; "
                f"set it to null, or choose another backbone.pretrained, such as Wan2.2-TI2V"
            )
        return 0.0
    return _IMAGE_SHARE if share is None else share


def _dataset(
    config: Config,
    cache: PriorCache,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    caption_dropout: float,
) -> PriorDataset:
    train = config.train
    return PriorDataset(
        cache,
        plan,
        clip_shapes(config),
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        recipe=train.recipe,
        negatives=train.negatives,
        caption_dropout=caption_dropout,
        image_share=image_share(config),
        seed=train.seed,
    )
