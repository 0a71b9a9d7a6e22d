"""How videos are sampled, and offline generation."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from pipelines.config.base import FolderOrS3, NonNegativeFloat, PoolConfig, Section


class StepCache(Section):
    """Which denoising steps reuse what an earlier one computed: by one of diffusers' caches, or none.

    It trades fidelity for time. Of diffusers' others, MagCache wants ratios measured on the very model, and
    Pyramid Attention Broadcast and FasterCache do not keep the two passes of Wan's guidance apart.
    """

    first_block: NonNegativeFloat | None = None
    """First Block Cache: relative change of the first block's output, up to which a step reuses the last one.

    0.1 is a usual value; null turns it off.
    """

    sea: NonNegativeFloat | None = None
    """SeaCache, for Wan: accumulated relative change of the latents, up to which a step reuses the last one.

    0.2 is a usual value; null turns it off.
    """

    taylorseer: Annotated[int, Field(ge=1)] | None = None
    """TaylorSeer: one step in this many is computed, the others are extrapolated. Null turns it off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_dump(exclude_none=True)) > 1:
            raise ValueError(f"at most one of {', '.join(type(self).model_fields)} can be set")
        return self


class SamplingConfig(Section):
    """How a video is sampled where a request does not say."""

    num_inference_steps: PositiveInt = 50
    """Denoising steps of a video. 50 is what the published pipelines take; time grows in proportion."""

    guidance_scale: NonNegativeFloat = 5.0
    """Weight of classifier-free guidance. Wan's is 5, CogVideoX's is 6; 1 or less is no guidance."""

    guidance_scale_2: NonNegativeFloat | None = None
    """Likewise, for the steps of low noise of a backbone with two transformers; not for a request to choose.

    Null, the default, is guidance_scale; where that is 1 or less, all steps are without guidance.
    Wan2.2-T2V-A14B was published with 4 for high noise and 3 for low.
    """

    negative_prompt: str = ""
    """What guidance leads away from. Empty by default, as in training, where captions are dropped."""

    step_cache: StepCache = StepCache()
    """Whether denoising steps reuse earlier ones; not for a request to choose. Off by default."""


class GenerateConfig(Section):
    """Offline generation."""

    output: FolderOrS3
    """Folder of the mp4 files and their manifest, or a place in S3. By default `videos` in run_dir.

    `s3://bucket/videos` takes s3fs, and the right to list, read and write there, on each node that generates.
    """

    seed: int = 0
    """Seed of the initial noise. A prompt that occurs again gets the next seed."""

    num_videos_per_prompt: PositiveInt = 1
    """Videos of each prompt, the first with `seed` and each other with the next."""

    batch_size: PositiveInt = 1
    """Videos made at once. More than 1 is quicker, but changes a video by rounding; so 1 is the default."""

    pool: PoolConfig = PoolConfig()
    """Actors that hold the model."""
