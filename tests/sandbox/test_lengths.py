"""What is true of a clip stays true however long it is, and as short as two frames."""

from pathlib import Path

import numpy as np
import pytest

from prophy.errors import ProPhyError
from prophy.sandbox import FLOOR_M, SCENES, Law, Part, Scene, SimulatedClip, play_parts, write_dataset
from tests.sandbox.stage import SCENES_BY_NAME

LONG_S = 10.0
HEAT = ("melting_block", "freezing_tank", "boiling_pot", "condensing_vapor", "candle")


def clip(
    scene: Scene, num_frames: int, fps: float, seed: int = 0, broken: Law | None = None
) -> SimulatedClip:
    rng = np.random.default_rng(seed)
    part = Part(scene, "red", "left")
    return play_parts((part,), rng, num_frames=num_frames, fps=fps, size=32, broken=broken)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
@pytest.mark.parametrize(("num_frames", "fps"), [(2, 8.0), (41, LONG_S / 2.5)])
def test_constants_and_tracks_of_any_length_are_numbers(scene: Scene, num_frames: int, fps: float) -> None:
    made = clip(scene, num_frames, fps)
    assert np.isfinite([*made.constants.values()]).all()
    assert all(np.isfinite(track.position_m).all() for track in made.tracks)


def test_one_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a clip has 2 frames or more, not 1: in one nothing happens"):
        clip(SCENES[0], 1, 8.0)
    with pytest.raises(ProPhyError, match="simulate.num_frames is 1, .*; set it to 2 or more"):
        write_dataset(tmp_path, num_clips=1, seed=0, num_frames=1, fps=8.0, size=32)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", HEAT)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_long_clip_is_about_lasts_to_its_end(name: str, seed: int) -> None:
    made = clip(SCENES_BY_NAME[name], 41, 4.0, seed)
    [mask] = made.masks.values()
    assert mask[-4:].any((1, 2)).all()
    change = np.abs(np.diff(made.frames[-9:].astype(int), axis=0))
    assert change.max() > 20, "it still happens"


@pytest.mark.parametrize("seed", range(3))
def test_rates_of_a_long_clip_are_those_of_its_motion(seed: int) -> None:
    def track(name: str) -> tuple[np.ndarray, dict[str, float]]:
        made = clip(SCENES_BY_NAME[name], 41, 4.0, seed)
        return made.tracks[0].position_m[:, 1], made.constants

    surface, constants = track("boiling_pot")
    assert surface.min() > 1.8, "the pot's bottom"
    np.testing.assert_allclose(np.diff(surface), -constants["level_fall_m_s"] / 4, atol=1e-9)
    wick, constants = track("candle")
    assert wick.min() > FLOOR_M
    np.testing.assert_allclose(np.diff(wick), -constants["burn_speed_m_s"] / 4, atol=1e-9)
    top, constants = track("melting_block")
    assert top.min() > FLOOR_M
    solid = ((top - FLOOR_M) / constants["block_height_m"]) ** 2 * constants["block_volume_m3"]
    np.testing.assert_allclose(np.diff(solid), -constants["melting_rate_m3_s"] / 4, atol=1e-9)
    ice, constants = track("freezing_tank")
    assert ice[-1] < FLOOR_M + 5.6
    expected = constants["ice_growth_m_per_sqrt_s"] * np.sqrt(np.arange(1, 20) / 4)
    np.testing.assert_allclose(ice[1:20] - FLOOR_M, expected, atol=1e-9)


def test_a_swing_that_widens_stays_as_wide_as_in_three_seconds() -> None:
    spring = SCENES_BY_NAME["block_on_spring"]
    reach = [
        np.ptp(clip(spring, num_frames, 16.0, broken=Law.ENERGY).tracks[0].position_m[:, 1])
        for num_frames in (49, 161)
    ]
    assert reach[1] < 1.3 * reach[0]


def test_up_to_three_seconds_nothing_is_slowed() -> None:
    for name in HEAT:
        short, whole = (clip(SCENES_BY_NAME[name], num_frames, 8.0) for num_frames in (17, 25))
        assert short.constants == whole.constants
        assert np.array_equal(short.frames, whole.frames[:17])
