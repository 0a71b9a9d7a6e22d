"""Flow matching against the schedulers that sample with it."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler

from prophy.objectives import FlowMatching
from prophy.tiny.pipeline import SCHEDULER

SCHEDULERS = [UniPCMultistepScheduler(**SCHEDULER), FlowMatchEulerDiscreteScheduler(shift=5.0)]


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_original_inverts_noise(latents: torch.Tensor, noise: torch.Tensor) -> None:
    objective = FlowMatching(shift=3.0)
    timesteps = objective.timesteps(torch.tensor([0.1, 0.5, 0.99]))
    noisy = objective.add_noise(latents, noise, timesteps)
    recovered = objective.original(noisy, objective.target(latents, noise), timesteps)
    torch.testing.assert_close(recovered, latents)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_the_pipelines_scheduler_follows_the_target(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor
) -> None:
    """Given the exact target, every step lands on the objective's own x_t, and the last on x_0."""
    objective = FlowMatching.from_scheduler(scheduler.config)
    target = objective.target(latents, noise)
    for step in range(4):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(step)
        now, after = (objective.num_train_timesteps * scheduler.sigmas[step + i].repeat(3) for i in (0, 1))
        noisy = objective.add_noise(latents, noise, now)
        stepped = scheduler.step(target, scheduler.timesteps[step], noisy).prev_sample
        expected = objective.add_noise(latents, noise, after)
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stepped, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_quantiles_are_shifted_as_the_scheduler_shifts(scheduler: SchedulerMixin) -> None:
    objective = FlowMatching.from_scheduler(scheduler.config)
    unshifted = torch.tensor([0.9, 0.5, 0.2])
    quantile = torch.distributions.Normal(0.0, 1.0).cdf(unshifted.logit())
    if isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.set_timesteps(sigmas=unshifted.double().numpy())
    else:
        scheduler.set_timesteps(sigmas=unshifted.tolist())
    torch.testing.assert_close(
        objective.timesteps(quantile), 1000 * scheduler.sigmas[:3], rtol=1e-4, atol=0.01
    )


def test_timesteps_are_logit_normal() -> None:
    quantiles = (torch.arange(10_000) + 0.5) / 10_000
    logits = (FlowMatching(shift=1.0).timesteps(quantiles) / 1000).logit()
    assert abs(logits.mean()) < 1e-3 and abs(logits.std() - 1) < 1e-2
    assert FlowMatching(shift=3.0).timesteps(torch.tensor([0.5])) == 750.0
