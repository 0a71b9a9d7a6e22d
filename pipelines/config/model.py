"""The models of a run: the backbone, the VLM that teaches, the Physical Branch."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.base import NonNegativeInt, Pretrained, Section
from prophy.backbones.families import FAMILIES


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"no such family; give one of: {', '.join(FAMILIES)}")
    return name


FamilyName = Annotated[
    str,
    AfterValidator(_known_family),
    Field(json_schema_extra=lambda schema: schema.update(enum=[*FAMILIES])),
]


class BackboneConfig(Section):
    """The video diffusion transformer with its VAE and text encoder, and the clips that it makes."""

    family: FamilyName
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
