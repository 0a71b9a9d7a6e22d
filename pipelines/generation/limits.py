"""What is known of a run's model before it is loaded. Imports no networks: drivers need none."""

import math

from pipelines.config import Config
from pipelines.generation.spec import ShapeLimits
from prophy.backbones.families import FAMILIES, ModelConfig
from prophy.backbones.pretrained import check_checkpoint, fingerprint, load_configs, takes_images
from prophy.errors import ProPhyError
from prophy.models.description import describe

PIPELINE_MULTIPLE = 16  # diffusers' pipelines refuse other sizes, even where VAE and patches would do with 8


def check_model(config: Config) -> None:
    """Checks that checkpoint and step cache of a run, if it has them, fit its backbone; loads no model.

    Raises:
        ProPhyError: no such model or checkpoint, the family cannot run the model, or not with texts of this
            length, the checkpoint was trained on another backbone, or the step cache is not for this family.
    """
    backbone = config.backbone
    _, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    FAMILIES[backbone.family].text(transformer, backbone.max_sequence_length)
    if config.sampling.step_cache.sea is not None and not FAMILIES[backbone.family].supports_sea:
        raise ProPhyError(
            f"sampling.step_cache.sea wants to know each step's noise level, which the pipeline of "
            f"{backbone.family} does not tell; use first_block or taylorseer"
        )
    if config.checkpoint is not None:
        check_checkpoint(config.checkpoint, backbone.pretrained, backbone.revision)


def model_fingerprint(config: Config) -> str:
    """What the model of a run is, whatever its name; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint.
    """
    parts = [fingerprint(config.backbone.pretrained, config.backbone.revision)]
    if config.checkpoint is not None:
        parts.append(fingerprint(str(config.checkpoint), None))
    if config.backbone.storage_dtype is not None:
        parts.append(config.backbone.storage_dtype)
    return " ".join(parts)


def shape_limits(config: Config) -> ShapeLimits:
    """What the model of a run can make and its endpoint allows; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint.
    """
    backbone = config.backbone
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    frames, height, width = FAMILIES[backbone.family].shape_multiples(vae, transformer)
    return ShapeLimits(
        frame_multiple=frames,
        height_multiple=math.lcm(height, PIPELINE_MULTIPLE),
        width_multiple=math.lcm(width, PIPELINE_MULTIPLE),
        max_num_frames=config.serve.max_num_frames or backbone.num_frames,
        max_pixels=config.serve.max_pixels or backbone.height * backbone.width,
        phenomena=_phenomena(config, transformer),
        images=takes_images(backbone.family, backbone.pretrained, backbone.revision),
    )


def _phenomena(config: Config, transformer: ModelConfig) -> tuple[str, ...]:
    """Names, in their order, of the branch; a complete export brings its own along."""
    if config.checkpoint is not None:
        return tuple(describe(config.checkpoint)["physics"]["phenomena"])
    return tuple(transformer["physics"]["phenomena"]) if "physics" in transformer else ()
