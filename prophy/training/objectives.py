"""What the transformer is trained to predict, and how a quantile becomes a timestep. Knows no network."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import CogVideoXDDIMScheduler


class FlowMatching:
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma noise, and the target is the velocity noise - x_0.

    Timesteps are logit-normal (Esser et al., 2024), then shifted as the pipeline's scheduler shifts its
    sigmas; timestep = sigma * num_train_timesteps. Where only a part of the levels of noise is drawn, that is
    this distribution, given that a level lies there.

    Args:
        shift: the scheduler's; larger means noisier.
        num_train_timesteps: the timestep of pure noise.
        levels: the least and the most noise, sigma as shifted.
    """

    def __init__(
        self, shift: float, num_train_timesteps: int = 1000, levels: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps
        self.levels = levels
        sigma = torch.tensor(levels, dtype=torch.float64)
        unshifted = sigma / (shift - (shift - 1) * sigma)
        self._quantiles = torch.special.ndtr(unshifted.logit()).tolist()

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], levels: tuple[float, float] = (0.0, 1.0)) -> Self:
        """The objective that fits a flow scheduler's configuration, UniPC's or flow-matching Euler's."""
        return cls(
            config["flow_shift"] if "flow_shift" in config else config["shift"],
            config["num_train_timesteps"],
            levels,
        )

    def timesteps(self, quantile: torch.Tensor) -> torch.Tensor:
        """Quantiles `[B]` in (0, 1) of the timestep's distribution -> timesteps `[B]`."""
        low, high = self._quantiles
        # Near noise alone the quantiles of the levels differ by less than float32 tells apart.
        sigma = torch.special.ndtri(low + quantile.double() * (high - low)).sigmoid()
        shifted = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return (shifted.clamp(*self.levels) * self.num_train_timesteps).to(quantile.dtype)

    def timesteps_at(self, levels: torch.Tensor) -> torch.Tensor:
        """Noise levels `[B]`, here sigma, -> timesteps `[B]`: 0 is the clip, 1 is noise alone."""
        return levels * self.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, like `latents` `[B, ...]`."""
        return torch.lerp(latents, noise, self._sigma(timesteps, latents))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the transformer shall predict, like `latents`; at all timesteps alike."""
        return noise - latents

    def original(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from x_t and a prediction: the inverse of `add_noise` where the prediction is the target."""
        return noisy - self._sigma(timesteps, noisy) * prediction

    def _sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        sigma = timesteps / self.num_train_timesteps
        return sigma.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class VPrediction:
    """Velocities (Salimans & Ho, 2022): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    The target is sqrt(a_t) noise - sqrt(1 - a_t) x_0, where a_t is the cumulative product of the pipeline's
    scheduler; timesteps are uniform integers. Its squared error is that of x_0 divided by 1 - a_t, which is
    what CogVideoX was trained on.

    Args:
        alphas_cumprod: a_t of each timestep.
        levels: the least and the most noise, as shares of the last timestep.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, levels: tuple[float, float] = (0.0, 1.0)) -> None:
        self.alphas_cumprod = alphas_cumprod.float()
        self.levels = levels

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], levels: tuple[float, float] = (0.0, 1.0)) -> Self:
        """The objective that fits the configuration of CogVideoX's schedulers, DDIM's or DPM's."""
        return cls(CogVideoXDDIMScheduler.from_config(config).alphas_cumprod, levels)

    def timesteps(self, quantile: torch.Tensor) -> torch.Tensor:
        """Quantiles `[B]` in (0, 1) of the timestep's distribution -> timesteps `[B]`, integers."""
        low, high = self.levels
        last = len(self.alphas_cumprod) - 1
        # A sum in float32 may be rounded up to 1, which is behind the last timestep.
        return ((low + quantile.double() * (high - low)) * (last + 1)).long().clamp(max=last)

    def timesteps_at(self, levels: torch.Tensor) -> torch.Tensor:
        """Noise levels `[B]`, as shares of the last timestep, -> timesteps `[B]`, integers."""
        return (levels * (len(self.alphas_cumprod) - 1)).round().long()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, like `latents` `[B, ...]`."""
        signal, sigma = self._factors(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the transformer shall predict at `timesteps`, like `latents`."""
        signal, sigma = self._factors(timesteps, latents)
        return signal * noise - sigma * latents

    def original(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from x_t and a prediction: the inverse of `add_noise` where the prediction is the target."""
        signal, sigma = self._factors(timesteps, noisy)
        return signal * noisy - sigma * prediction

    def _factors(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of x_0 and of the noise."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)


Objective = FlowMatching | VPrediction


def give_first_latent(
    noisy: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    given: torch.Tensor,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model sees whose first latent frame may be an image's: there no noise, and timestep 0.

    As in diffusers' pipelines of Wan2.2-TI2V (`expand_timesteps`).

    Args:
        noisy: x_t `[B, C, T, H, W]`.
        latents: x_0, like `noisy`.
        timesteps: `[B]`, of x_t.
        given: `[B]`, bool: whose first latent frame is given.
        num_tokens: N, of which each latent frame has as many.

    Returns:
        x_t with the given frames in it, and the timestep of each token, `[B, N]`.
    """
    first = torch.where(given.view(-1, 1, 1, 1, 1), latents[:, :, :1], noisy[:, :, :1])
    num_first = num_tokens // noisy.shape[2]
    of_first = torch.where(given, 0, timesteps)[:, None].expand(-1, num_first)
    of_others = timesteps[:, None].expand(-1, num_tokens - num_first)
    return torch.cat([first, noisy[:, :, 1:]], dim=2), torch.cat([of_first, of_others], dim=1)
