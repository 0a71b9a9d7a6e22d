"""What is known of a run's model before it is loaded. Imports no networks: drivers need none."""

import math

from pipelines.config import Config, StepCache
from pipelines.generation.spec import ShapeLimits
from prophy.backbones.families import FAMILIES, Shape
from prophy.backbones.pretrained import (
    branch_configs,
    check_checkpoint,
    fingerprint,
    load_configs,
    load_experts,
    takes_images,
)
from prophy.errors import ProPhyError
from prophy.models.description import phenomena_of
from prophy.models.stored import local_folder

PIPELINE_MULTIPLE = 16  # diffusers' pipelines refuse other sizes, even where VAE and patches would do with 8


def check_model(config: Config) -> None:
    """Checks that checkpoint and sampling of a run fit its backbone; loads no model.

    Raises:
        ProPhyError: no such model or checkpoint, the family cannot run the model, or not with texts of this
            length or videos of this shape, the checkpoint was trained on another backbone, the step cache is
            not for this family, or a second guidance scale not for this model or without a first.
    """
    backbone = config.backbone
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    family = FAMILIES[backbone.family]
    family.text(transformer, backbone.max_sequence_length)
    family.latent_shape(backbone.num_frames, backbone.height, backbone.width, vae, transformer)
    rows, columns = _multiples(family.shape_multiples(vae, transformer))
    if backbone.height % rows or backbone.width % columns:
        raise ProPhyError(
            f"{backbone.pretrained} makes no videos of {backbone.height}x{backbone.width}; set "
            f"backbone.height to a multiple of {rows} and backbone.width to one of {columns}"
        )
    if config.sampling.step_cache.sea is not None and not family.supports_sea:
        raise ProPhyError(
            f"sampling.step_cache.sea wants to know each step's noise level, which the pipeline of "
            f"{backbone.family} does not tell; use first_block or taylorseer"
        )
    second = config.sampling.guidance_scale_2
    experts = load_experts(backbone.family, backbone.pretrained, backbone.revision)
    if second is not None and len(experts) == 1:
        raise ProPhyError(
            f"sampling.guidance_scale_2 is {second:g}, but {backbone.pretrained} has one transformer; set it "
            f"to null"
        )
    first = config.sampling.guidance_scale
    if second is not None and second > 1 >= first:
        raise ProPhyError(
            f"sampling.guidance_scale_2 is {second:g}, but a sampling.guidance_scale of {first:g} switches "
            f"guidance off in all steps; set that above 1, or guidance_scale_2 to null"
        )
    if config.checkpoint is not None:
        check_checkpoint(local_folder(config.checkpoint), backbone.pretrained, backbone.revision)


def check_batch(config: Config, has_images: bool) -> None:
    """Checks that `prophy generate` can make its videos several at once; loads no model.

    Raises:
        ProPhyError: there is no such model, or it makes videos of images one at a time.
    """
    backbone, size = config.backbone, config.generate.batch_size
    _, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    if has_images and size > 1 and not FAMILIES[backbone.family].batches_images(transformer):
        raise ProPhyError(
            f"{backbone.pretrained} makes videos of images one at a time; set generate.batch_size, which is "
            f"{size}, to 1"
        )


def model_fingerprint(config: Config) -> str:
    """What the model of a run is, whatever its name; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint.
    """
    parts = [fingerprint(config.backbone.pretrained, config.backbone.revision)]
    if config.checkpoint is not None:
        parts.append(fingerprint(config.checkpoint, None))
    if config.backbone.storage_dtype is not None:
        parts.append(config.backbone.storage_dtype)
    return " ".join(parts)


def check_same_model(config: Config, began_with: str) -> None:
    """Checks that a worker finds the model with which its command began.

    Args:
        config: the run.
        began_with: fingerprint of that model.

    Raises:
        ProPhyError: another one lies there by now.
    """
    if model_fingerprint(config) != began_with:
        checkpoint = "" if config.checkpoint is None else f", or {config.checkpoint},"
        raise ProPhyError(
            f"{config.backbone.pretrained}{checkpoint} has changed since this command began; run it again"
        )


def shape_limits(config: Config) -> ShapeLimits:
    """What the model of a run can make and its endpoint allows; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint, or it cannot make serve.max_num_frames.
    """
    backbone = config.backbone
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    family = FAMILIES[backbone.family]
    frames, height, width = family.shape_multiples(vae, transformer)
    rows, columns = _multiples((frames, height, width))
    max_num_frames, only = config.serve.max_num_frames, family.only_clip(vae, transformer)
    if max_num_frames is not None and only is None:
        longest = max_num_frames - (max_num_frames - 1) % frames
        family.latent_shape(longest, backbone.height, backbone.width, vae, transformer)
    return ShapeLimits(
        frame_multiple=frames,
        height_multiple=rows,
        width_multiple=columns,
        token_height=height,
        token_width=width,
        sequence_parallel=config.serve.sequence_parallel,
        max_num_frames=max_num_frames or backbone.num_frames,
        max_pixels=config.serve.max_pixels or backbone.height * backbone.width,
        phenomena=_phenomena(config),
        images=takes_images(backbone.family, backbone.pretrained, backbone.revision),
        only=only,
    )


def check_sharing(config: Config, limits: ShapeLimits) -> None:
    """Checks that the processes of a replica can share a video; loads no model.

    Raises:
        ProPhyError: with `serve.cfg_parallel`, a step cache that looks at both passes of guidance at once; or
            with `serve.sequence_parallel`, a step cache, compiled blocks or a model without a branch, or
            attention heads, the tokens of a video of the configuration's shape or those of a text cannot be
            shared out.
    """
    backbone, number = config.backbone, config.serve.sequence_parallel
    family, step_cache = FAMILIES[backbone.family], config.sampling.step_cache
    if config.serve.cfg_parallel and family.guides_in_one_pass and step_cache.first_block is not None:
        raise ProPhyError(
            f"sampling.step_cache.first_block looks at both passes of {backbone.family}'s guidance at once, "
            f"and with serve.cfg_parallel each process sees one; leave the step cache out, or set the other "
            f"to false"
        )
    if number == 1:
        return
    chosen = f"serve.sequence_parallel is {number}"
    if step_cache != StepCache():
        raise ProPhyError(
            f"{chosen}, and processes that share a video would skip other steps each; leave "
            f"sampling.step_cache out, or set the other to 1"
        )
    if backbone.compile != "none":
        raise ProPhyError(
            f"{chosen}, and compiled attention among processes is not known to work; set backbone.compile "
            f"({backbone.compile!r}) to 'none', or the other to 1"
        )
    if not limits.phenomena:
        raise ProPhyError(
            f"{chosen}, and processes share videos of a model with a branch alone; name a checkpoint, or set "
            f"it to 1"
        )
    _, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    num_tokens = limits.num_tokens(backbone.num_frames, backbone.height, backbone.width)
    if reason := family.unshareable(number, num_tokens, backbone.max_sequence_length, transformer):
        raise ProPhyError(f"{chosen}, and so many processes {reason}; set it to another number")


def _multiples(shape_multiples: Shape) -> tuple[int, int]:
    """What the height and the width of a video that a pipeline makes are multiples of."""
    _, height, width = shape_multiples
    return math.lcm(height, PIPELINE_MULTIPLE), math.lcm(width, PIPELINE_MULTIPLE)


def _phenomena(config: Config) -> tuple[str, ...]:
    """Names, in their order, of the branch; a complete export brings its own along."""
    if config.checkpoint is not None:
        return tuple(phenomena_of(local_folder(config.checkpoint)))
    backbone = config.backbone
    own = branch_configs(backbone.family, backbone.pretrained, backbone.revision)
    return tuple(own[0]["phenomena"]) if own else ()
