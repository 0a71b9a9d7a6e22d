"""CogVideoX's text-to-video pipeline, with physics knobs and the text length of the branch's training."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.control import PhysicsControl


def num_videos(prompt: str | list[str] | None, arguments: Mapping[str, Any]) -> int:
    """How many videos a call makes: guidance runs as one batch of twice as many, the unguided half first."""
    prompts = arguments["prompt_embeds"] if prompt is None else prompt
    return 1 if isinstance(prompts, str) else len(prompts)


class ProPhyCogVideoXPipeline(PhysicsPipeline, CogVideoXPipeline):
    """`CogVideoXPipeline` whose transformer may carry a Physical Branch.

    Args beside upstream's:
        max_sequence_length: text tokens, saved in the pipeline's configuration.
    """

    # Written out in full: diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel,
        scheduler: SchedulerMixin,
        max_sequence_length: int = 226,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_to_config(max_sequence_length=max_sequence_length)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        physics: PhysicsControl | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes videos, as upstream's; see the base class."""
        if physics is not None and physics.trace is not None:
            physics.trace.num_videos = num_videos(prompt, kwargs)
        return super().__call__(prompt, *args, physics=physics, **kwargs)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """As upstream's; the VAE may have a precision of its own."""
        return super().decode_latents(latents.to(self.vae.dtype))
