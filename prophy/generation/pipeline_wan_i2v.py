"""Wan's image-to-video pipeline, with physics knobs and the text length of the branch's training."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedModel, PreTrainedTokenizerBase

from prophy.errors import ProPhyError
from prophy.generation.physics_pipeline import PhysicsPipeline


class ProPhyWanImageToVideoPipeline(PhysicsPipeline, WanImageToVideoPipeline):
    """`WanImageToVideoPipeline` whose transformer may carry a Physical Branch.

    `image` may also be `[B, 3, H, W]` in [0, 1], one for each prompt: upstream takes one image for all.

    Args beside upstream's:
        max_sequence_length: text tokens, saved in the pipeline's configuration.
    """

    # Written out in full: diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        image_processor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        max_sequence_length: int = 512,
    ) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            image_processor,
            image_encoder,
            transformer,
            transformer_2,
            boundary_ratio,
            expand_timesteps,
        )
        self.register_to_config(max_sequence_length=max_sequence_length)

    def for_images(self) -> "ProPhyWanImageToVideoPipeline":
        """Itself."""
        return self

    def encode_image(self, image: Any, device: torch.device | None = None) -> torch.Tensor:
        """As upstream's, which repeats what comes of it for every prompt.

        Raises:
            ProPhyError: several images.
        """
        if isinstance(image, torch.Tensor) and len(image) > 1:
            raise ProPhyError("this model's pipeline takes one image at a time; set generate.batch_size to 1")
        return self._embed_images(image, device)

    def _embed_images(self, image: Any, device: torch.device | None) -> torch.Tensor:
        """`[B, M, image_dim]`; of a tensor CLIP's processor would divide the pixels by 255 again."""
        if isinstance(image, torch.Tensor):
            image = self.video_processor.numpy_to_pil(self.video_processor.pt_to_numpy(image.float()))
        return super().encode_image(image, device)

    def encode_first_frame(self, image: torch.Tensor, num_frames: int) -> dict[str, torch.Tensor]:
        """See the base class."""
        height, width, channels = *image.shape[-2:], self.vae.config.z_dim
        device = self._execution_device
        pixels = self.video_processor.preprocess(image, height=height, width=width).to(device, torch.float32)
        _, condition = self.prepare_latents(
            pixels, len(image), channels, height, width, num_frames, torch.float32, device
        )
        tensors = {"image_latents": condition[:, -channels:]}
        if self.image_encoder is not None:
            tensors["image_embeds"] = self._embed_images(image, device)
        return tensors

    def prepare_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As upstream's; of several images each is encoded for its own video."""
        shape = (num_channels_latents, height, width, num_frames, dtype, device)
        if len(image) == 1:
            return super().prepare_latents(image, batch_size, *shape, generator, latents, last_image)
        parts: list[tuple[torch.Tensor, ...]] = []
        for index in range(batch_size):
            own = generator[index] if isinstance(generator, list) else generator
            given = None if latents is None else latents[index : index + 1]
            parts.append(super().prepare_latents(image[index : index + 1], 1, *shape, own, given, last_image))
        noise, condition, *mask = zip(*parts, strict=True)
        # The mask of the first frame is the same for all.
        return torch.cat(noise), torch.cat(condition), *(masks[0] for masks in mask)
