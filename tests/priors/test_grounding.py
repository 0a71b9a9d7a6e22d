"""Targets against plain loops written from prophy/METHOD.md, section 4."""

from typing import Any

import numpy as np
import pytest
import torch

from prophy.errors import ProPhyError
from prophy.priors.grounding import RECIPES, make_targets, motion, resample
from prophy.priors.recipes import Negatives

NUM_PHENOMENA = 17


def pairs(slices: int) -> torch.Tensor:
    """The times of slices that are pairs of frames, evenly spaced over the clip."""
    return torch.linspace(0, 1, 2 * slices, dtype=torch.float64).reshape(slices, 2)


PAIRS = pairs(4)
KNOWN: dict[str, Any] = {"slices": PAIRS, "num_phenomena": NUM_PHENOMENA, "recipe": "minus_background"}


@pytest.fixture
def maps() -> torch.Tensor:
    """Two phenomena and a background on the small VLM's grid."""
    return torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 256


def blurred(maps: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(maps)
    for t, y, x in np.ndindex(*maps.shape[1:]):
        window = maps[:, max(t - 1, 0) : t + 2, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        out[:, t, y, x] = window.mean((1, 2, 3))
    return out


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(16, 5, 16, 16, generator=torch.Generator().manual_seed(1))


def test_recipes(maps: torch.Tensor, latents: torch.Tensor) -> None:
    a, b, background = maps
    expected = {
        "none": torch.stack([a, b]),
        "minus_background": torch.stack([a - background, b - background]),
        "minus_mean": torch.stack([a, b]) - (a + b + background) / 3,
        "minus_others": torch.stack([a - b, b - a]),
    }
    grid, moved = (5, 8, 8), motion(latents, (5, 8, 8))
    for name, signed in expected.items():
        for blur, wanted in (("", signed), ("_blur", blurred(signed))):
            wanted = resample(wanted, grid, 17, PAIRS)
            torch.testing.assert_close(RECIPES[name + blur](maps, latents, grid, 17, PAIRS), wanted)
            torch.testing.assert_close(
                RECIPES[name + blur + "_motion"](maps, latents, grid, 17, PAIRS), wanted * moved
            )
    assert len(RECIPES) == 4 * len(expected)


def test_maps_of_few_slices_and_cells_are_blurred_too() -> None:
    maps = torch.rand(3, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    latents, grid = torch.zeros(4, 5, 2, 4), (5, 1, 2)
    found = RECIPES["minus_background_blur"](maps, latents, grid, 17, pairs(2))
    signed = blurred(maps)[:-1] - blurred(maps)[-1]
    torch.testing.assert_close(found, resample(signed, grid, 17, pairs(2)))


def test_motion_is_where_latents_differ_from_their_median(latents: torch.Tensor) -> None:
    still = latents[:, :1].repeat(1, 5, 1, 1)
    assert not motion(still, (5, 8, 8)).any()
    still[:, 3, 4:6, 10:12] += 2.0
    moved = motion(still, (5, 8, 8))
    assert moved[3, 2, 5] == pytest.approx(2.0) and moved.sum() == pytest.approx(2.0)


def test_minus_others_takes_the_mean_of_the_others_and_leaves_a_lone_map_alone(maps: torch.Tensor) -> None:
    four = torch.cat([maps, maps[:1].flip(-1)])
    torch.testing.assert_close(RECIPES["minus_others"].subtract(four)[0], four[0] - (four[1] + four[2]) / 2)
    assert torch.equal(RECIPES["minus_others"].subtract(maps[1:]), maps[1:2])


def test_resampling_to_the_same_space_keeps_every_cell(maps: torch.Tensor) -> None:
    first = resample(maps, (5, 8, 8), 17, PAIRS)[:, 0]
    assert torch.equal(first, maps[:, 0])  # frame 0 alone, before the centre of the first pair


@pytest.mark.parametrize(
    ("tokens", "num_frames", "slices"), [(5, 17, 4), (21, 81, 8), (13, 49, 12), (5, 17, 1)]
)
def test_time_is_mapped_by_the_centres_of_frames(tokens: int, num_frames: int, slices: int) -> None:
    """A map that holds, in each slice, the time of its centre must give each token the time of its centre."""
    vlm_times = np.linspace(0, 2.0, 2 * slices)
    centres = vlm_times.reshape(slices, 2).mean(1)
    times = np.linspace(0, 2.0, num_frames)
    compression = (num_frames - 1) // (tokens - 1)
    expected = [times[0]] + [times[1 + compression * j :][:compression].mean() for j in range(tokens - 1)]
    maps = torch.tensor(centres, dtype=torch.float32).reshape(1, slices, 1, 1).expand(1, slices, 2, 2)
    got = resample(maps, (tokens, 2, 2), num_frames, pairs(slices))
    np.testing.assert_allclose(got[0, :, 0, 0], np.clip(expected, centres[0], centres[-1]), atol=1e-5)


def test_slices_may_be_unevenly_spaced() -> None:
    """What a slice covers is what it says, not its place: a value that is the time stays the time."""
    slices = torch.tensor([[0.0, 0.0], [0.1, 0.3], [0.4, 1.0]], dtype=torch.float64)
    maps = slices.mean(1).float().reshape(1, 3, 1, 1)
    got = resample(maps, (9, 1, 1), 9, slices)
    np.testing.assert_allclose(got[0, :, 0, 0], np.clip(np.linspace(0, 1, 9), 0, 0.7), atol=1e-6)


def test_a_single_frame_takes_the_first_slice(maps: torch.Tensor) -> None:
    assert torch.equal(resample(maps, (1, 8, 8), 1, PAIRS)[:, 0], maps[:, 0])


def test_space_keeps_means_when_it_shrinks_and_lines_when_it_grows(maps: torch.Tensor) -> None:
    halved = resample(maps[:, :1].expand(-1, 4, -1, -1), (5, 4, 4), 17, PAIRS)
    torch.testing.assert_close(halved.mean(), maps[:, 0].mean(), rtol=1e-2, atol=0)
    ramp = torch.arange(8.0).expand(1, 4, 8, 8)
    doubled = resample(ramp, (5, 16, 16), 17, PAIRS)[0, 0, 0]
    torch.testing.assert_close(doubled[1:-1], (torch.arange(14) + 1) / 2 - 0.25)


@pytest.mark.parametrize("negatives", ["ignore", "zero", "all"])
def test_targets_from_the_formula(maps: torch.Tensor, latents: torch.Tensor, negatives: Negatives) -> None:
    grid, indices = (4, 8, 8), [10, 3]
    maps = maps[:, :1].expand(-1, 4, -1, -1)  # constant in time, which has its own test
    targets, mask = make_targets(
        maps,
        indices,
        latents,
        grid=grid,
        num_frames=13,
        **KNOWN,
        negatives=negatives,
    )
    assert targets.shape == mask.shape == (4 * 8 * 8, NUM_PHENOMENA)
    assert targets.dtype == torch.float32 and mask.dtype == torch.bool
    for k, index in enumerate(indices):
        difference = maps[k] - maps[-1]
        positive = difference[difference > 0].tolist()
        saturated = np.percentile(positive, 80)
        for t in range(4):
            for y in range(8):
                for x in range(8):
                    n = (t * 8 + y) * 8 + x
                    value = difference[t, y, x]
                    assert mask[n, index] == (value > 0 or negatives != "ignore")
                    expected = min(max(float(value), 0) / saturated, 1)
                    assert targets[n, index].item() == pytest.approx(expected, rel=1e-5)
    absent = [index for index in range(NUM_PHENOMENA) if index not in indices]
    assert (mask[:, absent] == (negatives == "all")).all() and not targets[:, absent].any()


@pytest.mark.parametrize("negatives", ["ignore", "zero", "all"])
def test_a_map_without_a_positive_cell_says_nothing(
    maps: torch.Tensor, latents: torch.Tensor, negatives: Negatives
) -> None:
    maps[-1] = maps.max() + 1
    targets, mask = make_targets(
        maps,
        [0, 1],
        latents,
        grid=(5, 8, 8),
        num_frames=17,
        **KNOWN,
        negatives=negatives,
    )
    assert not targets.any() and not mask[:, :2].any()


def test_no_phenomenon_no_target(maps: torch.Tensor, latents: torch.Tensor) -> None:
    targets, mask = make_targets(maps[-1:], [], latents, grid=(5, 8, 8), num_frames=17, **KNOWN)
    assert not targets.any() and not mask.any()


def test_unknown_recipe(maps: torch.Tensor, latents: torch.Tensor) -> None:
    with pytest.raises(ProPhyError, match="minus_backgroud.*train.recipe.*minus_background"):
        make_targets(
            maps, [0, 1], latents, grid=(5, 8, 8), num_frames=17, **KNOWN | {"recipe": "minus_backgroud"}
        )
