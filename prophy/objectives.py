"""What the transformer is trained to predict, and how a quantile becomes a timestep. Knows no network."""

from collections.abc import Mapping
from typing import Any, Self

import torch


class FlowMatching:
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma noise, and the target is the velocity noise - x_0.

    Timesteps are logit-normal (Esser et al., 2024), then shifted as the pipeline's scheduler shifts its
    sigmas; timestep = sigma * num_train_timesteps.

    Args:
        shift: the scheduler's; larger means noisier.
        num_train_timesteps: the timestep of pure noise.
    """

    def __init__(self, shift: float, num_train_timesteps: int = 1000) -> None:
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> Self:
        """The objective that fits a flow scheduler's configuration, UniPC's or flow-matching Euler's."""
        return cls(
            config["flow_shift"] if "flow_shift" in config else config["shift"], config["num_train_timesteps"]
        )

    def timesteps(self, quantile: torch.Tensor) -> torch.Tensor:
        """Quantiles `[B]` in (0, 1) of the timestep's distribution -> timesteps `[B]`."""
        sigma = torch.special.ndtri(quantile).sigmoid()
        return self.shift * sigma / (1 + (self.shift - 1) * sigma) * self.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, like `latents` `[B, ...]`."""
        return torch.lerp(latents, noise, self._sigma(timesteps, latents))

    def target(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the transformer shall predict, like `latents`."""
        return noise - latents

    def original(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_0 from x_t and a prediction: the inverse of `add_noise` where the prediction is the target."""
        return noisy - self._sigma(timesteps, noisy) * prediction

    def _sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        sigma = timesteps / self.num_train_timesteps
        return sigma.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
