"""The tracks and pixels of heat, gas and fire against their laws."""

import numpy as np
import pytest

from prophy.sandbox import FLOOR_M
from tests.sandbox.stage import play

SEEDS = range(4)


def linear_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and largest error of a line through the points."""
    fit = np.polyfit(x, y, 1)
    return fit[0], np.abs(np.polyval(fit, x) - y).max()


@pytest.mark.parametrize("seed", SEEDS)
def test_ice_becomes_puddle_at_a_constant_rate(seed: int) -> None:
    played = play("melting_block", seed, fps=8, size=128)
    height = played.tracks["block_top"][:, 1] - FLOOR_M
    solid = played.constants["block_volume_m3"] * (height / played.constants["block_height_m"]) ** 2
    rate, error = linear_fit(played.times_s, solid)
    assert -rate == pytest.approx(played.constants["melting_rate_m3_s"], rel=1e-6)
    assert error < 1e-9

    melted = solid[0] - solid[-1]
    row = int((10 - FLOOR_M - 0.1) * played.canvas.pixels_per_m)
    puddle_width = played.canvas.mask[-1, row].sum() / played.canvas.pixels_per_m
    assert np.pi / 4 * puddle_width * puddle_width / 3 == pytest.approx(melted, rel=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_ice_grows_with_the_root_of_time(seed: int) -> None:
    played = play("freezing_tank", seed, fps=8, size=128)
    thickness = played.tracks["ice_front"][:, 1] - FLOOR_M
    np.testing.assert_allclose(
        thickness, played.constants["ice_growth_m_per_sqrt_s"] * np.sqrt(played.times_s), atol=1e-9
    )
    drawn = played.canvas.mask.any(2).sum(1) / played.canvas.pixels_per_m
    assert np.abs(drawn - thickness).max() < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_boiling_level_falls_steadily(seed: int) -> None:
    played = play("boiling_pot", seed)
    rate, error = linear_fit(played.times_s, played.tracks["surface"][:, 1])
    assert -rate == pytest.approx(played.constants["level_fall_m_s"], rel=1e-6)
    assert error < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_drops_grow_by_volume_then_fall_by_g(seed: int) -> None:
    played = play("condensing_vapor", seed, duration_s=1.5)
    for name, track in played.tracks.items():
        hanging = (played.constants["cold_plate_height_m"] - track[:, 1]) / 0.8
        grows = hanging < played.constants["drop_critical_radius_m"] * (1 - 1e-9)
        rate, error = linear_fit(played.times_s[grows], 4 / 3 * np.pi * hanging[grows] ** 3)
        assert rate == pytest.approx(played.constants["condensation_m3_s"], rel=1e-6), name
        assert error < 1e-9
        falling = np.flatnonzero(~grows)[2:]
        fit = np.polyfit(played.times_s[falling], track[falling, 1], 2)
        assert -2 * fit[0] == pytest.approx(played.constants["g_m_s2"], rel=0.01), name


@pytest.mark.parametrize("seed", SEEDS)
def test_candle_burns_down_and_its_flame_puffs(seed: int) -> None:
    played = play("candle", seed, duration_s=4)
    wick = played.tracks["wick"][:, 1]
    rate, _ = linear_fit(played.times_s, wick)
    assert -rate == pytest.approx(played.constants["burn_speed_m_s"], rel=1e-6)
    flame = played.tracks["flame_tip"][:, 1] - wick
    rising = np.flatnonzero((flame[:-1] < flame.mean()) & (flame[1:] >= flame.mean())) / 60
    assert 1 / np.diff(rising).mean() == pytest.approx(
        1.5 / np.sqrt(played.constants["candle_diameter_m"]), rel=0.05
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_blast_wave_and_fragments(seed: int) -> None:
    played = play("bomb", seed, wide=True)
    age_s = played.times_s - played.constants["blast_time_s"]
    flying = age_s > 0
    shock, fragment = played.tracks["shock"], played.tracks["fragment"]
    radius = (shock - shock[0])[flying, 0]
    exponent, offset = np.polyfit(np.log(age_s[flying]), np.log(radius), 1)
    assert exponent == pytest.approx(0.4, abs=1e-6)
    density = played.constants["blast_energy_j"] / played.constants["air_density_kg_m3"]
    assert np.exp(5 * offset) == pytest.approx(density, rel=1e-6)
    fall = np.polyfit(age_s[flying], fragment[flying, 1], 2)
    assert -2 * fall[0] == pytest.approx(played.constants["g_m_s2"], rel=0.01)
