"""What decides a Physical Branch, as configuration files and saved models hold it. Imports no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from prophy.errors import ProPhyError
from prophy.taxonomy import check_names


class PhysicsConfig(BaseModel):
    """The Physical Branch: where it acts and how many experts it has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    physics_layers: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Layers of the backbone, from 0, that get a Physical Block each; ascending.

    The presets take every third layer of the first two thirds: the paper says as many as memory allows.
    """

    physical_blocks: bool = True
    """Whether the listed layers get Physical Blocks. False: the experts act on the backbone's own stream."""

    blocks_read: Literal["latents", "backbone"] = "latents"
    """What Physical Blocks read: the noisy latents, each what the one before made of them (the paper); or
    the tokens that the backbone has at their layer.

    By the latents the branch is blind to what the backbone knows. By its tokens maps come nearer to where
    the physics is, and routing alone, which load balancing asks for where batches are accumulated, costs a
    whole pass.
    """

    num_semantic_experts: NonNegativeInt = 8
    """Experts that the text chooses, for the whole video; 0: no Semantic Expert Block.

    The paper gives no number; 8 is fewer than WISA's phenomena, so that related ones share an expert.
    """

    num_refinement_experts: NonNegativeInt = 8
    """Experts that each token chooses; 0: no Refinement Expert Block.

    The paper gives no number, but widens it to the phenomena, so it has fewer.
    """

    top_k: PositiveInt = 2
    """Refinement experts that act on each token, at most num_refinement_experts. 2 is usual for mixtures."""

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


class BranchConfig(PhysicsConfig):
    """A branch of one model: the argument `physics` of a transformer, saved with it as JSON."""

    latent_shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    """Native (T, H, W) of the basis maps."""

    phenomena: Annotated[list[str], Field(min_length=1), AfterValidator(check_names)]
    """Names, in the order of every label vector and map that the branch was trained on."""

    @classmethod
    def read(cls, physics: Mapping[str, Any]) -> Self:
        """Checks what a file or a caller says of a branch.

        Raises:
            ProPhyError: a key is missing, unknown or has a bad value.
        """
        try:
            return cls.model_validate({**physics})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ProPhyError(f"the Physical Branch cannot be what physics says: {key}: {reason}") from None
