"""The tracks and pixels of light against their laws."""

import numpy as np
import pytest

from prophy.sandbox import COLOURS, FLOOR_M
from prophy.sandbox.drawing import GREY
from tests.sandbox.stage import Played, play

SEEDS = range(4)


def legs(track: np.ndarray, fps: float) -> list[np.ndarray]:
    """The velocities of a front that goes straight between corners, in order."""
    velocity = np.diff(track, axis=0) * fps
    steady = np.linalg.norm(np.diff(velocity, axis=0), axis=1) < 1e-6
    runs = np.split(velocity[1:], np.flatnonzero(~steady))
    return [run[-1] for run in runs if len(run) > 3 and np.linalg.norm(run[-1]) > 0]


def drawn_share(played: Played, row: int, under: tuple[float, ...]) -> np.ndarray:
    """How much of the light's colour lies over the colour `under` in one row: `[T, w]`."""
    change = np.array(COLOURS["red"]) - under
    return (played.canvas.frames[:, row] - np.array(under)) @ change / (change @ change)


@pytest.mark.parametrize("seed", SEEDS)
def test_angle_out_is_angle_in(seed: int) -> None:
    played = play("mirror", seed, fps=240)
    incoming, outgoing = legs(played.tracks["beam_front"], 240)
    tilt = played.constants["mirror_tilt_rad"]
    normal = np.array([np.sin(tilt), np.cos(tilt)])
    along = np.array([normal[1], -normal[0]])
    angle_in = np.arctan2(incoming @ along, -incoming @ normal)
    angle_out = np.arctan2(outgoing @ along, outgoing @ normal)
    assert angle_out == pytest.approx(angle_in, abs=1e-6)
    assert abs(angle_in) == pytest.approx(played.constants["angle_in_rad"], abs=1e-6)
    assert abs(angle_in) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_snell(seed: int) -> None:
    played = play("glass_block", seed, fps=240)
    above, inside, below = legs(played.tracks["refracted_front"], 240)
    index = played.constants["refractive_index"]
    sines = [leg[0] / np.linalg.norm(leg) for leg in (above, inside, below)]
    assert sines[0] == pytest.approx(index * sines[1], rel=1e-6)
    assert abs(sines[0]) == pytest.approx(np.sin(played.constants["incidence_rad"]), rel=1e-6)
    assert sines[2] == pytest.approx(sines[0], rel=1e-6)
    assert np.linalg.norm(above) == pytest.approx(index * np.linalg.norm(inside), rel=1e-6)


def test_photons_fly_exponential_paths_and_leave_in_every_direction() -> None:
    depths, directions = [], []
    for seed in range(120):
        played = play("foggy_beam", seed, fps=4, duration_s=6, size=8)
        last, end = played.tracks["photon"][-2:]
        away = (end - last) / np.linalg.norm(end - last)
        start = end + away * ((played.tracks["photon"][0, 0] - end[0]) / away[0])
        depths.append((played.constants["fog_top_m"] - start[1]) / played.constants["mean_free_path_m"])
        directions.append(away)
    assert np.mean(depths) == pytest.approx(1.0, abs=0.2)
    assert np.std(depths) == pytest.approx(1.0, abs=0.25)  # as large as the mean: exponential
    assert np.linalg.norm(np.mean(directions, axis=0)) < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_fringe_spacing(seed: int) -> None:
    played = play("two_slits", seed, fps=8, size=512)
    scale = played.canvas.pixels_per_m
    row = int((10 - FLOOR_M) * scale) + 2
    light = drawn_share(played, row, (58, 58, 64))[-1]
    peaks = np.flatnonzero((light[1:-1] > light[:-2]) & (light[1:-1] >= light[2:]) & (light[1:-1] > 0.2)) + 1
    spacing = np.diff(peaks) / scale
    assert len(peaks) >= 3
    law = (
        played.constants["wavelength_m"]
        * played.constants["screen_distance_m"]
        / played.constants["slit_distance_m"]
    )
    assert played.constants["fringe_spacing_m"] == pytest.approx(law)
    assert spacing[np.abs(peaks[:-1] - 128).argmin()] == pytest.approx(law, rel=0.06)


@pytest.mark.parametrize("seed", SEEDS)
def test_lamp_lights_the_floor_by_inverse_square_and_cosine(seed: int) -> None:
    played = play("lamp", seed, size=64, wide=True)
    light = drawn_share(played, 62, GREY)
    away = played.canvas.x[0, 0] - played.tracks["lamp"][0, 0]
    height = played.constants["lamp_height_m"]
    cosine = height / np.hypot(height, away)
    warm = 1 - np.exp(
        -np.maximum(played.times_s - played.constants["switched_on_s"], 0)
        / played.constants["warming_time_s"]
    )
    np.testing.assert_allclose(light, warm[:, None] * cosine**3, atol=1e-3)
    assert light.max() > 0.9
