"""Videos to latents, images and prompts to tensors, exactly as the backbone's pipeline has them."""

from typing import Any

import numpy as np
import torch

from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.placement import Offload, Placement
from prophy.backbones.pretrained import load_configs, takes_images
from prophy.device import autocast, default_device
from prophy.errors import ProPhyError


class VideoEncoder:
    """VAE and text encoder of a backbone, without its transformer.

    Args:
        pretrained: folder, hub id or "tiny".
        revision: commit, branch or tag, where it is a hub id.
        dtype: "float32" or "bfloat16", of the text encoder; of the VAE as `vae_dtype` says.
        autocast: "bfloat16", or None.
        max_sequence_length: text tokens; the same in training as at inference.
        family: key of `FAMILIES`.
        offload: see `Placement`.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None,
        dtype: str,
        autocast: str | None,
        max_sequence_length: int,
        family: str,
        offload: Offload = "none",
    ) -> None:
        self._pretrained = pretrained
        self._device = default_device()
        self._autocast = autocast
        self._max_sequence_length = max_sequence_length
        placement = Placement(self._device, offload)
        self._pipeline: Any = load_pipeline(
            family,
            pretrained,
            revision,
            getattr(torch, dtype),
            None,
            placement,
            transformer=None,
            transformer_2=None,
        )
        self._family = FAMILIES[family]
        self._configs = load_configs(family, pretrained, revision)
        vae_config, transformer_config = self._configs
        mean, std = self._family.latent_statistics(vae_config)
        self._mean = torch.tensor(mean, device=self._device).view(-1, 1, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(-1, 1, 1, 1)
        self._text = self._family.text(transformer_config, max_sequence_length)
        self._images = takes_images(family, pretrained, revision)
        self._padding = self._family.patch_size(transformer_config)[0] - 1

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> torch.Tensor:
        """RGB frames, uint8 `[B, T, H, W, 3]` -> latents `[B, C, T', H', W']`, float32, on the CPU.

        The posterior's mean, normalised as the pipeline de-normalises before it decodes; with the copies of
        the first latent frame that fill up the transformer's first patch in time.
        """
        pixels = torch.tensor(frames, device=self._device).permute(0, 4, 1, 2, 3) / 127.5 - 1.0
        vae = self._pipeline.vae
        with autocast(self._device, self._autocast):
            latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        latents = ((latents.float() - self._mean) / self._std).cpu()
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def encode_image(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        """RGB frames, uint8 `[B, T, H, W, 3]` -> the family's tensors `[B, ...]` of the first, on the CPU.

        There are none for models that do not always take an image.

        Raises:
            ProPhyError: they are not what the transformer reads.
        """
        if self._images != "always":
            return {}
        first = torch.tensor(frames[:, 0], device=self._device).permute(0, 3, 1, 2).float() / 255
        with autocast(self._device, self._autocast):
            image = self._pipeline.encode_first_frame(first, frames.shape[1])
        made = {name: tuple(value.shape[1:]) for name, value in image.items()}
        latents = self._family.latent_shape(*frames.shape[1:4], *self._configs)
        read = self._family.image(self._configs[1], latents)
        if made != read:
            raise ProPhyError(
                f"the image encoders of {self._pretrained} make {made}, and its transformer reads {read}; "
                f"choose another backbone.pretrained"
            )
        return {name: value.cpu() for name, value in image.items()}

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts -> the family's tensors `[B, ...]` as the pipeline's `encode_text` makes them, on the CPU.

        Raises:
            ProPhyError: they are not what the transformer reads.
        """
        with autocast(self._device, self._autocast):
            text = self._pipeline.encode_text(prompts, self._max_sequence_length)
        made = {name: tuple(value.shape[1:]) for name, value in text.items()}
        if made != self._text:
            raise ProPhyError(
                f"the text encoder of {self._pretrained} makes {made}, and its transformer reads "
                f"{self._text}; choose another backbone.pretrained"
            )
        return {name: value.cpu() for name, value in text.items()}
