"""Everything a run needs, section by section."""

from pathlib import Path
from typing import Self

import yaml
from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from pipelines.config.base import (
    Checkpoint,
    LocalPath,
    Section,
)
from pipelines.config.caching import CacheConfig
from pipelines.config.generation import GenerateConfig, SamplingConfig
from pipelines.config.model import BackboneConfig, PhysicsConfig, VlmConfig
from pipelines.config.sandbox import PretrainConfig, SimulateConfig
from pipelines.config.serving import ServeConfig
from pipelines.config.training import TrainConfig


class RayConfig(Section):
    """What a local Ray instance is started with; a cluster that is already there keeps its own."""

    num_cpus: PositiveInt = Field(description="logical CPUs; more than the cores, or small machines deadlock")


class Config(Section):
    """Everything a run needs."""

    run_dir: LocalPath = Field(description="folder of this run; other folders default to places inside it")
    checkpoint: Checkpoint | None = Field(
        None,
        description="folder of a trained branch, for serve and generate; 'tiny' is the embedded one, null is "
        "the bare backbone",
    )
    ray: RayConfig
    backbone: BackboneConfig
    vlm: VlmConfig
    physics: PhysicsConfig
    simulate: SimulateConfig
    cache: CacheConfig
    train: TrainConfig
    sampling: SamplingConfig
    serve: ServeConfig
    generate: GenerateConfig
    pretrain: PretrainConfig = PretrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.physics.any and self.train.backbone == "frozen":
            raise ValueError(
                "nothing to train: physics has neither blocks nor experts, and train.backbone is 'frozen'; "
                "set it to 'lora' or 'full', or add a part of the branch"
            )
        mixed = self.train.precision == "fp32" and self.backbone.dtype != "float32"
        if mixed and self.train.backbone != "full":  # which trains in float32
            raise ValueError(
                f"train.precision 'fp32' cannot compute with backbone.dtype {self.backbone.dtype!r}; set "
                f"that to 'float32', or train.precision to 'bf16'"
            )
        allowed = self.serve.max_num_frames
        if allowed is not None and allowed < self.backbone.num_frames:
            raise ValueError(
                f"serve.max_num_frames ({allowed}) is less than backbone.num_frames "
                f"({self.backbone.num_frames}), which a request gets that names no length"
            )
        pixels, default = self.serve.max_pixels, self.backbone.height * self.backbone.width
        if pixels is not None and pixels < default:
            raise ValueError(
                f"serve.max_pixels ({pixels}) is less than backbone.height times backbone.width ({default}), "
                f"which a request gets that names no size"
            )
        return self

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of training."""
        return self.run_dir / "train" / "checkpoints"

    @property
    def clip_lengths(self) -> list[tuple[float, int]]:
        """(seconds, frames of the backbone) of each length that a cached clip may have, the longest first."""
        durations_s = sorted([self.cache.clip_duration_s, *self.cache.shorter_clips_s], reverse=True)
        return [(duration_s, round(duration_s * self.backbone.fps) + 1) for duration_s in durations_s]

    def to_yaml(self) -> str:
        """The resolved configuration, as a file that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
