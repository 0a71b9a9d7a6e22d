"""Flow matching and velocities against the schedulers that sample with them."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from prophy.tiny.pipeline import SCHEDULER
from prophy.training.objectives import FlowMatching, Objective, VPrediction, give_first_latent

SCHEDULERS = [UniPCMultistepScheduler(**SCHEDULER), FlowMatchEulerDiscreteScheduler(shift=5.0)]

# As published with CogVideoX-2b.
COGVIDEOX = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(shift=3.0), VPrediction.from_scheduler(COGVIDEOX)],
    ids=lambda o: type(o).__name__,
)
def test_original_inverts_noise(objective: Objective, latents: torch.Tensor, noise: torch.Tensor) -> None:
    timesteps = objective.timesteps(torch.tensor([0.1, 0.5, 0.99]))
    noisy = objective.add_noise(latents, noise, timesteps)
    recovered = objective.original(noisy, objective.target(latents, noise, timesteps), timesteps)
    torch.testing.assert_close(recovered, latents)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_the_pipelines_scheduler_follows_the_target(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor
) -> None:
    """Given the exact target, every step lands on the objective's own x_t, and the last on x_0."""
    objective = FlowMatching.from_scheduler(scheduler.config)
    target = objective.target(latents, noise, torch.ones(3))
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


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_a_part_of_the_levels_is_drawn_as_all_are_there(shift: float) -> None:
    """The timesteps of two transformers, each as often as the boundary has it, are those of one."""
    quantiles, boundary = (torch.arange(20_000) + 0.5) / 20_000, 0.875
    of_one = FlowMatching(shift).timesteps(quantiles)
    low = FlowMatching(shift, levels=(0.0, boundary)).timesteps(quantiles)
    high = FlowMatching(shift, levels=(boundary, 1.0)).timesteps(quantiles)
    assert low.max() <= 875.0 <= high.min() and high.max() <= 1000.0
    share = (of_one < 875.0).float().mean()
    for level in (200.0, 600.0, 800.0):
        assert abs((low < level).float().mean() * share - (of_one < level).float().mean()) < 1e-3
    for level in (900.0, 950.0, 990.0):
        beyond = (high > level).float().mean() * (1 - share)
        assert abs(beyond - (of_one > level).float().mean()) < 1e-3


def test_a_part_of_the_levels_of_velocities() -> None:
    quantiles = torch.tensor([0.0, 0.5, 0.999])
    levels = VPrediction.from_scheduler(COGVIDEOX, (0.5, 1.0)).timesteps(quantiles)
    assert levels.tolist() == [500, 750, 999]


@pytest.mark.parametrize("least", [0.5, 0.96, 0.98, 0.999])
def test_no_quantile_is_behind_the_last_timestep(least: float) -> None:
    """Just below 1, where a float32 is rounded up."""
    last = torch.tensor([1 - 2**-24])
    assert VPrediction.from_scheduler(COGVIDEOX, (least, 1.0)).timesteps(last).tolist() == [999]


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("least", [0.98, 0.998, 0.999])
def test_levels_next_to_noise_alone_are_all_drawn(shift: float, least: float) -> None:
    quantiles = (torch.arange(1000) + 0.5) / 1000
    timesteps = FlowMatching(shift, levels=(least, 1.0)).timesteps(quantiles)
    assert timesteps.dtype == torch.float32 and len(timesteps.unique()) > 900
    assert 1000 * least <= timesteps.min() < 1000 * least + 0.1
    assert timesteps.max() <= 1000.0


@pytest.mark.parametrize("scheduler_type", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_velocity_is_the_schedulers(
    scheduler_type: type[SchedulerMixin], latents: torch.Tensor, noise: torch.Tensor
) -> None:
    """Noisy latents and velocities, down to a signal of zero at the last timestep."""
    scheduler = scheduler_type(**COGVIDEOX)
    objective = VPrediction.from_scheduler(scheduler.config)
    timesteps = objective.timesteps(torch.tensor([0.0005, 0.5, 0.9999]))
    assert timesteps.tolist() == [0, 500, 999]
    noisy = objective.add_noise(latents, noise, timesteps)
    velocity = objective.target(latents, noise, timesteps)
    assert torch.equal(noisy[2], noise[2]) and torch.equal(velocity[2], -latents[2])
    torch.testing.assert_close(scheduler.add_noise(latents, noise, timesteps), noisy)
    torch.testing.assert_close(scheduler.get_velocity(latents, noise, timesteps), velocity)


def test_a_given_first_latent_has_no_noise_and_timestep_0(latents: torch.Tensor, noise: torch.Tensor) -> None:
    timesteps, given = torch.tensor([100.0, 500.0, 900.0]), torch.tensor([True, False, True])
    seen, of_tokens = give_first_latent(noise, latents, timesteps, given, num_tokens=8)
    assert torch.equal(seen[:, :, 1:], noise[:, :, 1:])
    for index, is_given in enumerate(given):
        assert torch.equal(seen[index, :, 0], (latents if is_given else noise)[index, :, 0])
        first = 0.0 if is_given else float(timesteps[index])
        assert of_tokens[index].tolist() == [first] * 4 + [float(timesteps[index])] * 4


def test_a_noise_level_is_what_is_left_of_the_clip() -> None:
    levels = torch.tensor([0.25, 1.0])
    clip, noise = torch.ones(2, 4), torch.zeros(2, 4)
    flow = FlowMatching(shift=3.0)
    left = flow.add_noise(clip, noise, flow.timesteps_at(levels))
    torch.testing.assert_close(left, torch.tensor([[0.75] * 4, [0.0] * 4]))
    velocity = VPrediction(torch.linspace(0.999, 0.0, 1000))
    timesteps = velocity.timesteps_at(levels)
    assert timesteps.tolist() == [250, 999]
    assert velocity.add_noise(clip, noise, timesteps)[1].abs().max() == 0
