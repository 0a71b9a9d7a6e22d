"""Bodies and springs against their laws. Seeds are fixed, so nothing here is a matter of luck."""

import numpy as np
import pytest

from tests.sandbox.stage import Played, play

SEEDS = range(4)


def slopes(track: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Velocity in the middle between two frames."""
    return np.diff(track, axis=0) / np.diff(times_s)[:, None]


def acceleration(values: np.ndarray, times_s: np.ndarray) -> float:
    return 2 * np.polyfit(times_s, values, 2)[0]


def flights(played: Played) -> list[np.ndarray]:
    """Frames between impacts: a ball speeds up only when the floor pushes it."""
    velocity = slopes(played.tracks["ball"], played.times_s)[:, 1]
    impacts = np.flatnonzero(np.diff(velocity) > 0) + 1
    return [part for part in np.split(np.arange(len(played.times_s)), impacts) if len(part) > 8]


@pytest.mark.parametrize("seed", SEEDS)
def test_falling_ball_has_g_and_its_restitution(seed: int) -> None:
    played = play("bouncing_ball", seed)
    height = played.tracks["ball"][:, 1]
    first, second = flights(played)[:2]
    fits = [np.polyfit(played.times_s[part[1:-1]], height[part[1:-1]], 2) for part in (first, second)]
    for fit in fits:
        assert -2 * fit[0] == pytest.approx(played.constants["g_m_s2"], rel=0.01)
    impact_s = min(np.roots(fits[0] - fits[1]), key=lambda root: abs(root - played.times_s[second[0]]))
    before, after = (np.polyval(np.polyder(fit), impact_s) for fit in fits)
    assert -after / before == pytest.approx(played.constants["restitution"], rel=0.02)
    rest = played.constants["floor_height_m"] + played.constants["ball_radius_m"]
    assert height.min() == pytest.approx(rest, abs=0.2)
    assert height.min() > rest - 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_collision_keeps_momentum_and_has_its_restitution(seed: int) -> None:
    played = play("striking_ball", seed)
    tracks = [played.tracks[name] for name in ("striking_ball", "struck_ball")]
    masses = [played.constants[name] for name in ("striking_mass_kg", "struck_mass_kg")]
    velocities = [slopes(track, played.times_s) for track in tracks]
    hit = int(np.flatnonzero(np.abs(velocities[1]).sum(1) > 1e-6)[0])
    before, after = hit - 1, hit + 1  # not the frame during which they touch
    momentum = np.sum([mass * velocity for mass, velocity in zip(masses, velocities, strict=True)], axis=0)
    np.testing.assert_allclose(momentum[after], momentum[before], atol=1e-6)
    assert np.abs(velocities[0][after] - velocities[0][before]).max() > 0.5

    closing = velocities[0] - velocities[1]
    normal = closing[after] - closing[before]  # the impulse is along the line of centres
    restitution = -(closing[after] @ normal) / (closing[before] @ normal)
    assert restitution == pytest.approx(played.constants["restitution"], rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_pendulum_keeps_its_length_and_energy_and_has_its_period(seed: int) -> None:
    played = play("pendulum", seed, duration_s=5)
    x, y = played.tracks["bob"].T
    length, release = played.constants["pendulum_length_m"], abs(played.constants["release_angle_rad"])
    np.testing.assert_allclose(np.hypot(x, y - 9.0), length, rtol=0.002)

    speed = np.linalg.norm(slopes(played.tracks["bob"], played.times_s), axis=1)
    energy = speed**2 / 2 + played.constants["g_m_s2"] * (y[1:] + y[:-1]) / 2
    assert np.ptp(energy) < 0.02 * (speed**2 / 2).max()

    crossings = np.flatnonzero(np.diff(np.sign(x)) != 0)
    exact = crossings + x[crossings] / (x[crossings] - x[crossings + 1])
    small = 2 * np.pi * np.sqrt(length / played.constants["g_m_s2"])
    period = small * (1 + release**2 / 16 + 11 * release**4 / 3072)
    assert 2 * np.diff(exact)[0] / 60 == pytest.approx(period, rel=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_wheel_rolls_without_slipping(seed: int) -> None:
    played = play("rolling_wheel", seed)
    track, slope = played.tracks["wheel"], played.constants["slope_rad"]
    way = np.linalg.norm(track - track[0], axis=1)
    law = 2 / 3 * played.constants["g_m_s2"] * np.sin(slope)  # g sin(slope) if it slipped
    assert acceleration(way, played.times_s) == pytest.approx(law, rel=0.01)
    run, drop = np.abs(track[-1] - track[0])
    assert np.arctan2(drop, run) == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_spring_swings_at_its_own_frequency(seed: int) -> None:
    played = play("block_on_spring", seed, fps=120)
    height = played.tracks["block"][:, 1]
    pull = np.diff(height, 2) * 120**2
    slope, intercept = np.polyfit(height[1:-1], pull, 1)
    assert -slope == pytest.approx(
        played.constants["stiffness_n_m"] / played.constants["block_mass_kg"], rel=0.01
    )
    assert -intercept / slope == pytest.approx(played.constants["rest_height_m"], abs=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_jelly_falls_by_g_then_is_squashed(seed: int) -> None:
    played = play("jelly", seed, size=64)
    height = played.tracks["jelly"][:, 1]
    free = played.times_s < 0.35
    assert -acceleration(height[free], played.times_s[free]) == pytest.approx(
        played.constants["g_m_s2"], rel=0.01
    )
    width = played.canvas.mask.any(1).sum(1)
    assert width[height.argmin() - 6 : height.argmin() + 6].max() >= width[0] + 2
