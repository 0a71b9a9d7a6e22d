"""The configuration of a run: one strict YAML file, one frozen model per part of the product.

`load_config("tiny", ["train.learning_rate=1e-4"])` reads a preset of `pipelines/configs/` or any YAML file,
applies the overrides, resolves `${...}` references and checks every key and value.
"""

import difflib
import re
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from prophy.errors import ProPhyError
from prophy.tiny import bundled

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())


def _absolute_folder(name: str) -> str:
    return _absolute(name) if name != "tiny" and Path(name).is_dir() else name


# Workers run in folders of their own: what is relative on the command line must not stay so.
def _checkpoint(name: object) -> object:
    return bundled("branch") if name == "tiny" else name


LocalPath = Annotated[Path, AfterValidator(Path.absolute)]
Location = Annotated[str, AfterValidator(_absolute)]
Pretrained = Annotated[str, AfterValidator(_absolute_folder)]
Checkpoint = Annotated[Path, BeforeValidator(_checkpoint), AfterValidator(Path.absolute)]


class Section(BaseModel):
    """Base of every part: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RayConfig(Section):
    """What a local Ray instance is started with; a cluster that is already there keeps its own."""

    num_cpus: PositiveInt = Field(description="logical CPUs; more than the cores, or small machines deadlock")


class PoolConfig(Section):
    """One pool of Ray actors: how many, and what each reserves."""

    size: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0


class BackboneConfig(Section):
    """The video diffusion transformer with its VAE and text encoder, and the clips that it makes."""

    family: Literal["wan", "cogvideox"]
    pretrained: Pretrained = Field(
        description="hub id or folder of a diffusers pipeline; 'tiny' is the embedded one"
    )
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    autocast: Literal["bfloat16"] | None = None
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    fps: PositiveFloat
    max_sequence_length: PositiveInt = Field(description="text tokens; the same in training as at inference")
    aspect_buckets: list[tuple[PositiveInt, PositiveInt]] | None = Field(
        None,
        description="(height, width) each; a cached clip takes the nearest. Null: height and width",
    )

    @property
    def frame_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of every shape that a cached clip may have."""
        return self.aspect_buckets or [(self.height, self.width)]


class VlmConfig(Section):
    """The Qwen2.5-VL that teaches: what it sees, and which of its attention is kept."""

    pretrained: Pretrained = Field(description="hub id or folder; 'tiny' is the embedded one")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device_map: str | None = None
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    layers: list[NonNegativeInt] | None = Field(
        None, description="layers whose attention is kept; all if null"
    )
    heads: list[NonNegativeInt] | None = Field(
        None, description="heads of these layers that are kept; all if null"
    )
    max_new_tokens: PositiveInt = 64


class PhysicsConfig(Section):
    """The Physical Branch: where it acts and how many experts it has."""

    physics_layers: list[NonNegativeInt] = Field(min_length=1)
    physical_blocks: bool = Field(
        True,
        description="false: the listed layers get none, and the experts act on the backbone's own stream",
    )
    num_semantic_experts: NonNegativeInt = Field(8, description="0: no Semantic Expert Block")
    num_refinement_experts: NonNegativeInt = Field(8, description="0: no Refinement Expert Block")
    top_k: PositiveInt = 2

    @property
    def any(self) -> bool:
        """Whether the branch has anything at all; without, a run is LoRA or full tuning alone."""
        return bool(self.physical_blocks or self.num_semantic_experts or self.num_refinement_experts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_refinement_experts and self.top_k > self.num_refinement_experts:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed num_refinement_experts ({self.num_refinement_experts})"
            )
        if sorted(set(self.physics_layers)) != self.physics_layers:
            raise ValueError(f"physics_layers ({self.physics_layers}) must be ascending, each layer once")
        return self


class SimulateConfig(Section):
    """The simulated physics clips."""

    output: LocalPath
    num_clips: PositiveInt
    seed: int = 0
    num_frames: PositiveInt
    fps: PositiveFloat
    size: PositiveInt = Field(description="height and width in pixels")


class VideoLimits(Section):
    """What a video may be, and what reading it may take, before it goes to quarantine."""

    max_bytes: PositiveInt = 2_000_000_000
    max_pixels: PositiveInt = Field(3840 * 2160, description="per frame")
    max_frames: PositiveInt = 500_000
    max_duration_s: PositiveFloat = 3600.0
    max_streams: PositiveInt = Field(16, description="video, sound, subtitles and others together")
    max_seconds: PositiveFloat = Field(120.0, description="to measure a video, or to decode one clip")
    max_memory_bytes: PositiveInt = Field(4_000_000_000, description="address space of a decoding process")


class CacheConfig(Section):
    """Offline prior caching: which videos, into which folder, with which pools."""

    input: Location = Field(
        description="folder or URL of videos, or a list of them: Parquet, CSV or JSON Lines with `path` and "
        "optional `caption` and `phenomena`, or WISA-80K's JSON"
    )
    output: Location
    clip_duration_s: PositiveFloat = Field(description="videos are cut into clips of this length")
    shorter_clips_s: list[PositiveFloat] = Field(
        [], description="lengths of clips for what is left at the end, or of a video shorter than a clip"
    )
    limits: VideoLimits = VideoLimits()
    rows_per_file: PositiveInt = 32
    read: PoolConfig = PoolConfig()
    extract: PoolConfig = PoolConfig()
    encode: PoolConfig = PoolConfig()
    encode_batch_size: PositiveInt = Field(1, description="clips that the VAE encodes at once")


class LossWeights(Section):
    """The weights of Eq. 6."""

    semantic_alignment: NonNegativeFloat = 0.1
    token_alignment: NonNegativeFloat = 0.02
    load_balancing: NonNegativeFloat = 0.01


class TrainConfig(Section):
    """Training of the branch with Ray Train and DeepSpeed."""

    start_from: Checkpoint | None = Field(
        None,
        description="folder of a trained branch to go on from; 'tiny' is the embedded one, null is a new one",
    )
    backbone: Literal["frozen", "lora", "full"] = Field(
        "frozen", description="what of the backbone is trained beside the branch"
    )
    lora_rank: PositiveInt = 128
    lora_alpha: PositiveInt = 16
    num_steps: PositiveInt
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt = Field(
        description="samples in a step, whatever the number of workers; the rest is accumulated"
    )
    num_workers: PositiveInt
    cpus_per_worker: NonNegativeFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what workers share out: 1 the optimizer, 2 gradients too, 3 parameters too"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="to the CPU: the optimizer (ZeRO 1 to 3), or parameters too (ZeRO 3)"
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass")
    precision: Literal["fp32", "bf16"] = "bf16"
    learning_rate: PositiveFloat = 1e-4
    backbone_learning_rate: PositiveFloat = Field(
        2e-5, description="of the adapter, or of the whole backbone"
    )
    warmup_steps: NonNegativeInt = 200
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after the warm-up; cosine ends at 0 with the last step"
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="of a moving average of the trained parameters, which is then what is exported"
    )
    weight_decay: NonNegativeFloat = 0.01
    gradient_clipping: PositiveFloat = 1.0
    caption_dropout: Fraction = 0.1
    recipe: str = Field(
        "minus_others_blur_motion", description="how raw maps become targets: prophy/priors/grounding.py"
    )
    negatives: Literal["ignore", "zero"] = "ignore"
    reduction: Literal["mean", "sum"] = "mean"
    loss_weights: LossWeights = LossWeights()
    num_held_out: NonNegativeInt = Field(
        0,
        description="videos of the cache that are not trained on: the newest checkpoint is measured there, "
        "as soon as the one before is done, and the last",
    )
    sample_prompts: list[str] = Field(
        [], description="of videos that the same checkpoints make, with pictures of their routing maps"
    )
    evaluation_cpus: NonNegativeFloat = Field(
        1.0, description="of the task that does both, beside the workers; they do not wait for it"
    )
    evaluation_gpus: NonNegativeFloat = 0.0
    seed: int = 0
    log_every: PositiveInt = 10
    save_every: PositiveInt = 500
    num_to_keep: PositiveInt = 2
    max_failures: NonNegativeInt = Field(
        2, description="restarts from the last checkpoint when a worker dies"
    )

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of each worker in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % (self.micro_batch_size * self.num_workers):
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times num_workers ({self.num_workers})"
            )
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {needed} at least")
        return self


class StepCache(Section):
    """Which denoising steps reuse what an earlier one computed: by one of diffusers' caches, or none.

    It trades fidelity for time. Of diffusers' others, MagCache wants ratios measured on the very model, and
    Pyramid Attention Broadcast and FasterCache do not keep the two passes of Wan's guidance apart.
    """

    first_block: float | None = Field(
        None,
        ge=0,
        description="First Block Cache: relative change of the first block's work that is let pass",
    )
    sea: float | None = Field(
        None,
        ge=0,
        description="SeaCache, for Wan: accumulated relative change of the latents that is let pass",
    )
    taylorseer: int | None = Field(
        None, ge=1, description="TaylorSeer: one step in so many is computed, the others are extrapolated"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_dump(exclude_none=True)) > 1:
            raise ValueError(f"at most one of {', '.join(type(self).model_fields)} can be set")
        return self


class SamplingConfig(Section):
    """How a video is sampled where a request does not say."""

    num_inference_steps: PositiveInt = 50
    guidance_scale: NonNegativeFloat = 5.0
    negative_prompt: str = ""
    step_cache: StepCache = Field(StepCache(), description="not for a request to choose; off by default")


class ServeConfig(Section):
    """The HTTP endpoint and its replicas."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        [],
        description="SHA-256 of each key that is let in, as `prophy key` prints it; none: only on loopback",
    )
    output: LocalPath = Field(description="folder of the job database and the videos")
    database: str | None = Field(
        None,
        description="SQLAlchemy URL; null: SQLite in `output`. Several nodes need PostgreSQL; its "
        "password belongs in PGPASSWORD or ~/.pgpass",
    )
    videos: Location | None = Field(
        None, description="folder or fsspec URL of the finished videos; null: in `output`"
    )
    expire_after_s: PositiveFloat | None = Field(
        7 * 86400.0, description="how long the files of a video are kept; null: until it is deleted"
    )
    max_body_bytes: PositiveInt = 1 << 20
    max_queued: PositiveInt = 100
    min_replicas: NonNegativeInt = 0
    max_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    max_pixels: PositiveInt | None = Field(
        None, description="per frame; null: as many as the backbone's clips"
    )
    max_num_frames: PositiveInt | None = Field(None, description="null: as many as the backbone's clips")
    drain_timeout_s: PositiveFloat = Field(
        3600.0, description="how long a replica that is scaled away may go on with its video"
    )
    upscale_delay_s: NonNegativeFloat = 30.0
    downscale_delay_s: NonNegativeFloat = 600.0

    @property
    def database_url(self) -> str:
        """Of the job database, as SQLAlchemy writes it."""
        return self.database or f"sqlite:///{self.output / 'jobs.sqlite'}"

    @property
    def videos_location(self) -> str:
        """Folder or URL of the finished videos."""
        return self.videos or str(self.output / "videos")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})"
            )
        if self.database is not None and re.match(r"[^/]*//([^/@:]*:[^@]+@|.*[?&]password=)", self.database):
            raise ValueError("database must not hold a password; put it into PGPASSWORD or ~/.pgpass")
        return self


class GenerateConfig(Section):
    """Offline generation."""

    output: LocalPath
    seed: int = 0
    batch_size: PositiveInt = Field(
        1, description="videos made at once; more than 1 is quicker, but changes a video by rounding"
    )
    pool: PoolConfig = PoolConfig()


Part = Literal["vlm", "vae", "backbone", "branch", "bundle"]
"""A part of the embedded default, or all that were trained, put where the product looks for them."""


class PretrainConfig(Section):
    """How long each part of the embedded default is trained, where it is made from nothing."""

    num_clips: PositiveInt = Field(3000, description="simulated clips that VAE and backbone learn from")
    vlm_steps: PositiveInt = 2000
    vae_steps: PositiveInt = 2400
    backbone_steps: PositiveInt = 1900
    seed: int = 0


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


def preset_names() -> list[str]:
    """Names of the configurations that come with the product."""
    folder = resources.files("pipelines") / "configs"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: list[str] | None = None) -> Config:
    """Reads, overrides, resolves and checks a configuration.

    Args:
        name_or_path: a preset's name, or the path of a YAML file.
        overrides: `section.key=value` each; the value is read as YAML.

    Raises:
        ProPhyError: no such file, not YAML, an unknown key (names the nearest one), or a bad value.
    """
    path = _find(name_or_path)
    given, where = OmegaConf.create(), str(path)
    try:
        tree = OmegaConf.load(path)
        if overrides:
            where += " with what the command line adds"
            given = OmegaConf.from_dotlist(overrides)
        values = OmegaConf.to_container(OmegaConf.merge(tree, given), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        raise ProPhyError(f"{where} is not a valid configuration: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ProPhyError(_explain(error, path, OmegaConf.to_container(given))) from None


def _find(name_or_path: str) -> Path:
    if name_or_path in preset_names():
        return Path(str(resources.files("pipelines") / "configs" / f"{name_or_path}.yaml"))
    path = Path(name_or_path)
    if not path.is_file():
        raise ProPhyError(
            f"no configuration {name_or_path!r}; give a YAML file or one of: {', '.join(preset_names())}"
        )
    return path


def _explain(error: ValidationError, path: Path, given: Any) -> str:
    """One sentence about the first thing that is wrong in `path` and what is `given` on the command line."""
    first = error.errors()[0]
    key, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    where = "on the command line" if _holds(given, first["loc"]) else f"in {path}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}; did you mean {nearest_key(Config, first['loc'])!r}?"
    if first["type"] == "missing":
        return f"missing key {key!r} {where}; add it"
    if isinstance(first["input"], dict):  # values that do not go together; the message says which
        section = f" for {key!r}" if key else ""
        return (
            f"bad values{section} in {path}{' with what the command line adds' if given else ''}: {message}"
        )
    return f"bad value for {key!r} {where}: {message} (got {first['input']!r})"


def _holds(tree: Any, location: tuple[int | str, ...]) -> bool:
    for key in location:
        if not isinstance(tree, dict):  # a list: it is given as a whole
            return True
        if key not in tree:
            return False
        tree = tree[key]
    return True


def nearest_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The valid key, dotted, that is nearest to the unknown one at `location` in data for `model`."""
    section: Any = model
    for part in location[:-1]:
        section = section.model_fields[part].annotation
        if get_origin(section) is types.UnionType:
            section = get_args(section)[0]
    nearest = difflib.get_close_matches(str(location[-1]), list(section.model_fields), n=1, cutoff=0.0)[0]
    return ".".join([*map(str, location[:-1]), nearest])
