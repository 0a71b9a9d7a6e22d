"""Liquid, gas and a pressed block against their laws. Seeds are fixed, so nothing is a matter of luck."""

import numpy as np
import pytest

from tests.sandbox.stage import play

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_liquid_keeps_its_volume(seed: int) -> None:
    played = play("pouring_liquid", seed, fps=8, duration_s=4.5, size=128)
    area = played.canvas.mask.sum((1, 2)) / played.canvas.pixels_per_m**2
    poured = played.constants["flow_m3_s"] * played.constants["tap_open_s"]
    settled = area[played.times_s > 3.2]
    assert np.ptp(settled) < 0.03 * poured
    assert settled.mean() == pytest.approx(poured, rel=0.08)
    assert np.abs(played.tracks["liquid"][-1, 0]) < 0.1 * played.constants["tank_width_m"]


@pytest.mark.parametrize("seed", SEEDS)
def test_smoke_rises_as_a_buoyant_plume(seed: int) -> None:
    played = play("smoke", seed)
    rise = played.tracks["smoke_front"][:, 1] - played.constants["chimney_height_m"]
    age_s = played.times_s + played.constants["oldest_puff_s"]
    exponent, offset = np.polyfit(np.log(age_s), np.log(rise), 1)
    assert exponent == pytest.approx(0.75, abs=1e-6)
    entrainment, flux = played.constants["entrainment"], played.constants["buoyancy_flux_m4_s3"]
    speed_times_root = 5 / (6 * entrainment) * np.cbrt(9 * entrainment * flux / (10 * np.pi))
    assert np.exp(offset) == pytest.approx((4 / 3 * speed_times_root) ** 0.75, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_pressed_block_keeps_its_volume_and_its_new_shape(seed: int) -> None:
    played = play("press", seed, fps=8, size=192)
    area = played.canvas.mask.sum((1, 2)) / played.canvas.pixels_per_m**2
    np.testing.assert_allclose(area, played.constants["block_area_m2"], rtol=0.04)
    top = played.tracks["block_top"][:, 1]
    assert (np.diff(top) <= 0).all()
    assert top[-1] - 1.0 < 0.55 * (top[0] - 1.0)
