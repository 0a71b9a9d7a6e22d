"""CogVideoX's image-to-video pipeline, with physics knobs and the text length of the branch's training."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    SchedulerMixin,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.generation.pipeline_cogvideox import num_videos
from prophy.models.control import PhysicsControl


class ProPhyCogVideoXImageToVideoPipeline(PhysicsPipeline, CogVideoXImageToVideoPipeline):
    """`CogVideoXImageToVideoPipeline` whose transformer may carry a Physical Branch.

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

    def for_images(self) -> "ProPhyCogVideoXImageToVideoPipeline":
        """Itself."""
        return self

    def __call__(self, *args: Any, physics: PhysicsControl | None = None, **kwargs: Any) -> Any:
        """Makes videos, as upstream's; see the base class."""
        if physics is not None and physics.trace is not None:
            physics.trace.num_videos = num_videos(kwargs.get("prompt", (*args, None, None)[1]), kwargs)
        return super().__call__(*args, physics=physics, **kwargs)

    def prepare_latents(
        self, image: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As upstream's; the VAE may have a precision of its own."""
        return super().prepare_latents(image.to(self.vae.dtype), *args, **kwargs)

    def encode_first_frame(self, image: torch.Tensor, num_frames: int) -> dict[str, torch.Tensor]:
        """See the base class. The posterior's mean, of which upstream's pipeline draws a sample."""
        height, width = image.shape[-2:]
        pixels = self.video_processor.preprocess(image, height=height, width=width)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels[:, :, None]).latent_dist.mode().float()
        factor = self.vae_scaling_factor_image
        return {
            "image_latents": latents / factor if self.vae.config.invert_scale_latents else latents * factor
        }

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """As upstream's; the VAE may have a precision of its own."""
        return super().decode_latents(latents.to(self.vae.dtype))
