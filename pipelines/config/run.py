"""Everything a run needs, section by section."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PositiveInt, model_validator

from pipelines.config.base import BranchFolder, LocalPath, Section, TaxonomyName
from pipelines.config.caching import CacheConfig
from pipelines.config.evaluation import EvaluateConfig
from pipelines.config.generation import GenerateConfig, SamplingConfig
from pipelines.config.model import BackboneConfig, PhysicsConfig, VlmConfig
from pipelines.config.sandbox import PretrainConfig, SimulateConfig
from pipelines.config.serving import ServeConfig
from pipelines.config.training import TrainConfig
from pipelines.layout import RunFolder
from prophy.errors import ProPhyError

NEEDS = {
    "simulate": ("simulate",),
    "cache": ("backbone", "vlm", "cache"),
    "cache verify": ("cache",),
    "cache inspect": ("backbone", "vlm", "cache"),
    "cache explain": ("vlm", "cache"),
    "train": ("backbone", "vlm", "physics", "cache", "train"),
    "plan": ("backbone", "vlm", "physics", "cache", "train"),
    "export": ("backbone",),
    "generate": ("backbone",),
    "evaluate": ("backbone",),
    "evaluate --ablation": ("backbone", "vlm", "physics", "cache", "train"),
    "serve": ("backbone",),
    "pretrain": (),
    "pretrain branch": ("backbone", "vlm", "physics", "simulate", "cache", "train"),
    "demo": ("backbone", "vlm", "physics", "simulate", "cache", "train"),
}
"""The sections that each command needs, of those that a configuration may lack."""

WRITES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("simulate", "cache", "train", "generate", "evaluate", "serve", "pretrain")},
    "evaluate --ablation": ("evaluate",),
    "pretrain branch": ("simulate", "cache", "train"),
    "demo": ("simulate", "cache", "train", "generate", "serve"),
}
"""Under which names each command keeps its configuration in the run folder."""

# Values of sections that a configuration may lack; reading one that it lacks is an error, see `Config`.
_LEFT_OUT: Any = None


class RayConfig(Section):
    """A local Ray."""

    num_cpus: PositiveInt = Field(default_factory=lambda: max(8, os.cpu_count() or 1))
    """Logical CPUs of a local Ray.

    Those of the machine, but 8 at least: on a small machine, actors that reserve one each would wait for each
    other for ever.
    """


class Config(Section):
    """Everything a run needs.

    A section without defaults may be left out. Reading it then raises `ProPhyError`; `NEEDS` says which
    commands do.
    """

    run_dir: LocalPath
    """Folder of this run; other folders default to places inside it."""

    checkpoint: BranchFolder | None = None
    """Folder of a trained branch, for serve and generate: what `prophy train` or `prophy export` wrote.

    'tiny' is the embedded one, null the bare backbone. Of a place in S3, such as s3://bucket/model, each node
    that loads it makes a copy in PROPHY_HOME. Of a backbone with two transformers, it is the branch of one of
    them, or of both (`prophy export --with`).
    """

    taxonomy: TaxonomyName = "wisa"
    """Which phenomena are told apart: a YAML file, or 'wisa', the built-in one of WISA-80K.

    A cache and a trained branch keep the names in their order: another taxonomy needs another cache.output
    and a new branch. What serves or generates takes the names from its branch, and from here with which
    words a prompt names them.
    """

    ray: RayConfig = Field(default_factory=RayConfig)
    """What a local Ray instance is started with; a cluster that is already there keeps its own."""

    backbone: BackboneConfig = _LEFT_OUT
    """The video diffusion transformer with its VAE and text encoder, and the clips that it makes."""

    vlm: VlmConfig = _LEFT_OUT
    """The vision-language model that teaches: what it sees, and which of its attention is kept."""

    physics: PhysicsConfig = _LEFT_OUT
    """The Physical Branch: where it acts and how many experts it has."""

    simulate: SimulateConfig = _LEFT_OUT
    """`prophy simulate`: simulated physics clips."""

    cache: CacheConfig = _LEFT_OUT
    """`prophy cache`: which videos, into which folder, with which pools of actors."""

    train: TrainConfig = _LEFT_OUT
    """`prophy train`, `plan` and `export`: what is trained, how, and on how many workers."""

    sampling: SamplingConfig = SamplingConfig()
    """How `prophy generate` and `serve` sample a video, where a request does not say."""

    serve: ServeConfig
    """`prophy serve`: the HTTP endpoint and its replicas."""

    generate: GenerateConfig
    """`prophy generate`: videos made offline."""

    evaluate: EvaluateConfig
    """`prophy evaluate`: models compared on the same clips, prompts and noise."""

    pretrain: PretrainConfig = PretrainConfig()
    """`prophy pretrain`: how long each part of the embedded default is trained from nothing."""

    @model_validator(mode="before")
    @classmethod
    def _place(cls, values: Any) -> Any:
        """Puts the folders that no key names into the run folder."""
        if not isinstance(values, dict) or not isinstance(values.get("run_dir"), str | Path):
            return values
        folder = RunFolder(Path(values["run_dir"]))
        places = {"simulate": folder.clips, "cache": folder.cache}
        places = {name: place for name, place in places.items() if name in values}
        places |= {"serve": folder.serve, "generate": folder.videos, "evaluate": folder.evaluation}
        sections = {name: values.get(name, {}) for name in places}
        return values | {
            name: {"output": str(places[name]), **section}
            for name, section in sections.items()
            if isinstance(section, dict)
        }

    @model_validator(mode="after")
    def _drop_what_is_left_out(self) -> Self:
        for name in set().union(*NEEDS.values()):
            if self.__dict__[name] is _LEFT_OUT:
                del self.__dict__[name]
        return self

    # Not for mypy, which would take any attribute to be there.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise ProPhyError(
                    f"this needs the section {name!r}, which the configuration does not have; add it to the "
                    "file, or let the file extend a preset, such as with `extends: tiny`"
                )
            return super().__getattr__(name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if {"physics", "train", "backbone"} <= self.__dict__.keys():
            self._check_training()
        if "backbone" in self.__dict__:
            self._check_serving()
        return self

    def _check_training(self) -> None:
        if not self.physics.any and self.train.backbone == "frozen":
            raise ValueError(
                "nothing to train: physics has neither blocks nor experts, and train.backbone is 'frozen'; "
                "set it to 'lora' or 'full', or add a part of the branch"
            )
        if self.train.keep_attention and self.backbone.compile != "none":
            raise ValueError(
                "train.keep_attention does not see the attention inside of a compiled block; set "
                "backbone.compile to 'none', or keep_attention to false"
            )
        if self.train.storage_dtype is not None and self.backbone.compile != "none":
            raise ValueError(
                "train.storage_dtype is not known to work with backbone.compile; leave one of them out"
            )
        mixed = self.train.precision == "fp32" and self.backbone.dtype != "float32"
        if mixed and self.train.backbone != "full":  # which trains in float32
            raise ValueError(
                f"train.precision 'fp32' cannot compute with backbone.dtype {self.backbone.dtype!r}; set "
                f"that to 'float32', or train.precision to 'bf16'"
            )

    def _check_serving(self) -> None:
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

    @property
    def checkpoints(self) -> str:
        """Where the checkpoints of training lie."""
        return self.train.checkpoints or str(RunFolder(self.run_dir).checkpoints)

    @property
    def clip_lengths(self) -> list[tuple[float, int]]:
        """(seconds, frames of the backbone) of each length that a cached clip may have, the longest first."""
        durations_s = sorted([self.cache.clip_duration_s, *self.cache.shorter_clips_s], reverse=True)
        return [(duration_s, round(duration_s * self.backbone.fps) + 1) for duration_s in durations_s]

    def lacking(self, command: str) -> list[str]:
        """The sections that `command` needs and this configuration lacks."""
        return [section for section in NEEDS[command] if section not in self.__dict__]
