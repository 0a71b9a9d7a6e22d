"""How videos are sampled, and offline generation."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from pipelines.config.base import LocalPath, NonNegativeFloat, PoolConfig, Section


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


class GenerateConfig(Section):
    """Offline generation."""

    output: LocalPath
    seed: int = 0
    batch_size: PositiveInt = Field(
        1, description="videos made at once; more than 1 is quicker, but changes a video by rounding"
    )
    pool: PoolConfig = PoolConfig()
