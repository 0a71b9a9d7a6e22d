"""Simulated clips, and how the embedded default is made from nothing."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.base import LocalPath, Section


class SimulateConfig(Section):
    """The simulated physics clips."""

    output: LocalPath
    num_clips: PositiveInt
    seed: int = 0
    num_frames: PositiveInt
    fps: PositiveFloat
    size: PositiveInt = Field(description="height and width in pixels")


Part = Literal["vlm", "vae", "backbone", "branch", "bundle"]
"""A part of the embedded default, or all that were trained, put where the product looks for them."""


class PretrainConfig(Section):
    """How long each part of the embedded default is trained, where it is made from nothing."""

    num_clips: PositiveInt = Field(3000, description="simulated clips that VAE and backbone learn from")
    vlm_steps: PositiveInt = 2000
    vae_steps: PositiveInt = 2400
    backbone_steps: PositiveInt = 1900
    seed: int = 0
