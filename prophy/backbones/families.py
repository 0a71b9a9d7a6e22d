"""What the configurations of a family of video diffusion transformers say of shapes. Imports no networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prophy.errors import ProPhyError

Shape = tuple[int, int, int]
ModelConfig = Mapping[str, Any]
"""Of a VAE or a transformer, as its file has it."""


@dataclass(frozen=True)
class Family:
    """How one family cuts a video into latents and tokens.

    Attributes:
        vae_factors: VAE's configuration -> how much it shrinks time and space.
        latent_statistics: VAE's configuration -> mean and standard deviation of latents, per channel or one.
        patch_size: transformer's configuration -> latents per token, (t, h, w).
    """

    vae_factors: Callable[[ModelConfig], tuple[int, int]]
    latent_statistics: Callable[[ModelConfig], tuple[list[float], list[float]]]
    patch_size: Callable[[ModelConfig], Shape]

    def latent_shape(
        self,
        num_frames: int,
        height: int,
        width: int,
        vae_config: ModelConfig,
        transformer_config: ModelConfig,
    ) -> Shape:
        """(T, H, W) of the latents of a clip: the first frame is encoded alone, then groups of frames.

        A transformer with patches in time gets its first patch filled up with copies of the first latent
        frame, as its pipeline makes room for them.

        Raises:
            ProPhyError: the VAE cannot encode clips of this length or size.
        """
        time, space = self.vae_factors(vae_config)
        patch_t = self.patch_size(transformer_config)[0]
        if num_frames % (time * patch_t) != 1 or height % space or width % space:
            raise ProPhyError(
                f"the VAE cannot encode {num_frames} frames of {height}x{width}; "
                f"take {time * patch_t} n + 1 frames, and multiples of {space} pixels"
            )
        return (num_frames - 1) // time + patch_t, height // space, width // space

    def token_grid(self, latent_shape: Shape, transformer_config: ModelConfig) -> Shape:
        """(T', H', W') of the tokens, one per patch.

        Raises:
            ProPhyError: the patches do not fill the latents.
        """
        patch_size = self.patch_size(transformer_config)
        if any(length % patch for length, patch in zip(latent_shape, patch_size, strict=True)):
            raise ProPhyError(
                f"latents of {tuple(latent_shape)} cannot be cut into patches of {patch_size}; "
                f"change num_frames, height or width"
            )
        t, h, w = (length // patch for length, patch in zip(latent_shape, patch_size, strict=True))
        return t, h, w

    def shape_multiples(self, vae_config: ModelConfig, transformer_config: ModelConfig) -> Shape:
        """What the (frames after the first, height, width) of a video must be multiples of."""
        time, space = self.vae_factors(vae_config)
        patch_t, patch_h, patch_w = self.patch_size(transformer_config)
        return time * patch_t, space * patch_h, space * patch_w


FAMILIES: dict[str, Family] = {
    "wan": Family(
        # Configurations of older diffusers leave these two out.
        vae_factors=lambda vae: (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)),
        latent_statistics=lambda vae: (vae["latents_mean"], vae["latents_std"]),
        patch_size=lambda transformer: tuple(transformer["patch_size"]),
    ),
    "cogvideox": Family(
        vae_factors=lambda vae: (
            int(vae.get("temporal_compression_ratio", 4)),
            2 ** (len(vae["block_out_channels"]) - 1),
        ),
        latent_statistics=lambda vae: ([0.0], [1 / vae["scaling_factor"]]),
        patch_size=lambda transformer: (
            transformer.get("patch_size_t") or 1,
            transformer["patch_size"],
            transformer["patch_size"],
        ),
    ),
}
