"""The Muon optimiser for matrices and convolution kernels, in float32.

torch.optim.Muon refuses kernels, and orthogonalises in bfloat16, which many CPUs can only emulate.
"""

from collections.abc import Iterable

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan, 2024), scaled to AdamW's size (Liu et al., 2025).

    A kernel `[out, in, ...]` counts as the matrix `[out, in * ...]`.

    Args:
        params: parameters with two or more dimensions.
        lr: learning rate; one that suits AdamW suits this too.
        momentum: Nesterov momentum.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalise(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * max(direction.shape) ** 0.5
                parameter.add_(direction.view_as(parameter), alpha=-size)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix `[M, N]` with the same singular vectors and values near 1 (0.7 to 1.2), by Newton-Schulz."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
