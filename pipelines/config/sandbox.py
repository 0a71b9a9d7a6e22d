"""Simulated clips, and how the embedded default is trained on them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.base import How, LocalPath, Section

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class SimulateConfig(Section):
    """The simulated physics clips."""

    output: LocalPath
    """Folder of the clips and their manifest. By default `clips` in run_dir."""

    num_clips: Annotated[PositiveInt, Field(le=1_000_000)]
    """Number of clips, at most a million: no two data sets share one."""

    seed: Seed = 0
    """Seed of what the clips show; the same seed gives the same clips."""

    num_frames: PositiveInt
    """Frames of a clip, 2 or more; those of the backbone, so that nothing is resampled."""

    fps: PositiveFloat
    """Frames per second of a clip; those of the backbone, so that nothing is resampled."""

    size: PositiveInt
    """Height and width of a clip in pixels."""


Part = Literal["vlm", "vae", "text_encoder", "backbone", "branch", "bundle"]
"""A part of the embedded default, or all that were trained, put where the product looks for them."""


class PretrainConfig(Section):
    """How long each part of the embedded default is trained, where it is made from nothing.

    The defaults made the weights that come with the product.
    """

    num_clips: PositiveInt = 3000
    """Simulated clips that VAE and backbone learn from."""

    text_steps: Annotated[PositiveInt, How()] = 1000
    """Optimizer steps of the text encoder."""

    text_task: Literal["products", "missing_words"] = "products"
    """What the text encoder is taught: which thing, in which colour, is where; or to fill in missing words.

    The second is what the encoders of published backbones were taught, which saw text alone.
    """

    vlm_steps: Annotated[PositiveInt, How()] = 2000
    """Optimizer steps of the VLM."""

    vae_steps: Annotated[PositiveInt, How()] = 2400
    """Optimizer steps of the VAE."""

    backbone_steps: Annotated[PositiveInt, How()] = 1900
    """Optimizer steps of the transformer."""

    start_from: LocalPath | None = None
    """Folder of a transformer that the backbone goes on from; null begins with new weights."""

    seed: Seed = 0
    """Seed of the clips, of new weights and of the order of batches."""
