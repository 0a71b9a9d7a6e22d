"""Videos to latents and prompts to text embeddings, exactly as the backbone's pipeline has them."""

import numpy as np
import torch

from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import load_configs
from prophy.device import autocast, default_device


class VideoEncoder:
    """VAE and text encoder of a backbone, without its transformer.

    Args:
        pretrained: folder, hub id or "tiny".
        revision: commit, branch or tag, where it is a hub id.
        dtype: "float32" or "bfloat16", of the text encoder; the VAE stays in float32.
        autocast: "bfloat16", or None.
        max_sequence_length: text tokens; the same in training as at inference.
        family: key of `FAMILIES`.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None,
        dtype: str,
        autocast: str | None,
        max_sequence_length: int,
        family: str,
    ) -> None:
        self._device = default_device()
        self._autocast = autocast
        self._max_sequence_length = max_sequence_length
        self._pipeline = load_pipeline(
            family, pretrained, revision, getattr(torch, dtype), None, transformer=None
        ).to(self._device)
        vae_config, transformer_config = load_configs(family, pretrained, revision)
        mean, std = FAMILIES[family].latent_statistics(vae_config)
        self._mean = torch.tensor(mean, device=self._device).view(-1, 1, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(-1, 1, 1, 1)
        self._padding = FAMILIES[family].patch_size(transformer_config)[0] - 1

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> torch.Tensor:
        """RGB frames, uint8 `[B, T, H, W, 3]` -> latents `[B, C, T', H', W']`, float32, on the CPU.

        The posterior's mean, normalised as the pipeline de-normalises before it decodes; with the copies of
        the first latent frame that fill up the transformer's first patch in time.
        """
        pixels = torch.tensor(frames, device=self._device).permute(0, 4, 1, 2, 3) / 127.5 - 1.0
        with autocast(self._device, self._autocast):
            latents = self._pipeline.vae.encode(pixels).latent_dist.mode()
        latents = ((latents.float() - self._mean) / self._std).cpu()
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> embeddings `[B, L, D]` as the pipeline's `encode_prompt` returns them, on the CPU."""
        with autocast(self._device, self._autocast):
            embeds, _ = self._pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=self._max_sequence_length
            )
        return embeds.cpu()
