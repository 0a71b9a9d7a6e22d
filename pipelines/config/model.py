"""The models of a run: the backbone, the VLM that teaches, the Physical Branch."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.base import How, NonNegativeInt, Pretrained, Section
from prophy.backbones.families import FAMILIES
from prophy.models import physics_config


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"no such family; give one of: {', '.join(FAMILIES)}")
    return name


FamilyName = Annotated[
    str,
    AfterValidator(_known_family),
    Field(json_schema_extra=lambda schema: schema.update(enum=[*FAMILIES])),
]


def _check_size(section: "BackboneConfig | VlmConfig") -> None:
    size = (section.height, section.width)
    if size not in section.frame_shapes:
        raise ValueError(
            f"clips are made in the shapes of aspect_buckets, and height and width ({list(size)}) are none "
            f"of {[list(shape) for shape in section.frame_shapes]}; set them to one of these, or set "
            "aspect_buckets too, to null for one shape"
        )


class BackboneConfig(Section):
    """The video diffusion transformer with its VAE and text encoder, and the clips that it makes."""

    family: FamilyName
    """Which classes the backbone is made of: an entry of prophy/backbones, or of another package."""

    pretrained: Pretrained
    """Hub id or folder, also in S3, of a diffusers pipeline; 'tiny' is the embedded one."""

    revision: str | None = None
    """Commit, branch or tag on the hub. Null is the newest when a run begins; the run then keeps it."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in memory.

    bfloat16 is what the published weights were trained in, but for CogVideoX-2b's, which are of float16: in
    bfloat16 they lose 3 of 10 binary digits.
    """

    autocast: Literal["bfloat16"] | None = None
    """Precision that forward passes compute in, if not that of the weights.

    For float32 weights on a CPU: small 3-D convolutions are about ten times faster in bfloat16, where the CPU
    has the instructions; elsewhere it is ignored.
    """

    attention: Annotated[
        Literal["native", "_native_cudnn", "_native_flash", "_flash_3", "_flash_3_hub", "sage", "sage_hub"],
        How(),
    ] = "native"
    """Kernel of the transformer's attention, by diffusers' name; what does not run here is refused.

    `native` is PyTorch's own choice and runs everywhere. `_native_cudnn` needs nothing installed, `_flash_3`
    the package flash-attn-3, `sage` (which cannot train) sageattention; `_hub` takes a kernel from the hub.
    """

    compile: Annotated[Literal["none", "regional"], How()] = "none"
    """Whether torch.compile compiles the blocks of backbone and branch, to train and to serve.

    It takes minutes at the first step or video, so it is off by default.
    """

    offload: Annotated[Literal["none", "text_encoder", "all"], How()] = "none"
    """What waits in the host's memory until it is used, to cache, generate and serve; training has its own.

    The text encoder of Wan holds 11 GB of a GPU for the 15 ms of a text. With `all` the blocks of the
    transformer come one by one too, at each step: for what does not fit otherwise. Videos stay the same.
    """

    storage_dtype: Annotated[Literal["float8_e4m3fn"] | None, How()] = None
    """Precision that `generate` and `serve` keep the backbone's weights in; null, the default, is `dtype`.

    8 bits take half the memory of bfloat16, and change a video slightly. It computes in `dtype` as before.
    The branch, an adapter, norms and embeddings stay as they are.
    """

    num_frames: PositiveInt
    """Frames of a clip: 4 n + 1, since the VAEs compress time by 4 after the first frame."""

    height: PositiveInt
    """Height of a clip in pixels; a multiple of what VAE and patches take together, mostly 16."""

    width: PositiveInt
    """Width of a clip in pixels; a multiple of what VAE and patches take together, mostly 16."""

    fps: PositiveFloat
    """Frames per second of a clip. Videos of another rate are resampled to it."""

    max_sequence_length: PositiveInt
    """Tokens of a text, which is padded or cut to this length; the same in training as at inference."""

    aspect_buckets: Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)] | None = None
    """Shapes (height, width) in pixels that clips are cached and trained in. Null: `height` and `width`.

    `height` and `width` are one of them, which videos are made in where nothing else is asked for. A clip
    takes the one nearest to what the VLM sees of it; each needs a shape of about its aspect ratio in
    vlm.aspect_buckets.
    """

    @property
    def frame_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of every shape that a cached clip may have."""
        return self.aspect_buckets or [(self.height, self.width)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_size(self)
        return self


class VlmConfig(Section):
    """The vision-language model that teaches: what it sees, and which of its attention is kept."""

    pretrained: Pretrained
    """Hub id or folder, also in S3, of the vision-language model; 'tiny' is the embedded one."""

    revision: str | None = None
    """Commit, branch or tag on the hub. Null is the newest when a run begins."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in memory. bfloat16 is what the published weights were trained in."""

    device_map: str | None = None
    """How transformers spreads the model over devices: `auto` uses all GPUs of the actor.

    Null puts it on the actor's one device, which is quicker where it fits.
    """

    num_frames: PositiveInt
    """Frames of a clip that the VLM sees, evenly spaced. An even number: it takes them in pairs."""

    height: PositiveInt
    """Height in pixels of what the VLM sees; for Qwen2.5-VL a multiple of 28 (patch 14, merged 2 x 2)."""

    width: PositiveInt
    """Width in pixels of what the VLM sees; for Qwen2.5-VL a multiple of 28 (patch 14, merged 2 x 2)."""

    aspect_buckets: Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)] | None = None
    """Shapes (height, width) in pixels that the VLM sees clips in. Null: `height` and `width` alone.

    `height` and `width` are one of them. A clip is cut at its centre to the aspect ratio of the nearest; the
    backbone gets the same part, in a shape of about this aspect ratio.
    """

    layers: list[NonNegativeInt] | None = None
    """Layers whose attention makes the maps; all if null. `prophy cache explain` shows where each looks."""

    heads: list[NonNegativeInt] | None = None
    """Heads of these layers whose attention makes the maps; all if null."""

    max_new_tokens: PositiveInt = 64
    """Tokens after which an answer is cut. 64 hold two sentences; each token costs a forward pass."""

    @property
    def frame_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of every shape that the VLM sees clips in."""
        return self.aspect_buckets or [(self.height, self.width)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_size(self)
        return self


class PhysicsConfig(physics_config.PhysicsConfig, Section):
    """The Physical Branch: where it acts and how many experts it has."""
