from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prophy.evaluation.motion import Fall, Law, fit_law, follow, measure_fall
from prophy.sandbox import COLOURS, SCENES, Part, SimulatedClip, play_parts
from prophy.sandbox.scene import GRAVITY_M_S2

[BALL] = [scene for scene in SCENES if scene.name == "bouncing_ball"]


def fall_of(clip: SimulatedClip, **changes: Any) -> Fall:
    [part] = clip.parts
    known = {"colour": part.colour, "side": part.side, "fps": clip.fps, "pixels_per_m": clip.pixels_per_m}
    arguments: dict[str, Any] = known | changes
    return measure_fall(clip.frames, **arguments)


def ball(seed: int, colour: str = "red", side: str = "left") -> SimulatedClip:
    rng = np.random.default_rng(seed)
    return play_parts((Part(BALL, colour, side),), rng, num_frames=17, fps=8.0, size=64)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_finds_the_law_of_simulated_falls(colour: str, side: str) -> None:
    clip = ball(3, colour, side)
    fall = fall_of(clip)
    assert fall.acceleration_m_s2 == pytest.approx(GRAVITY_M_S2, rel=0.03)
    assert fall.restitution == pytest.approx(clip.constants["restitution"], abs=0.05)
    assert fall.residual_m < 0.03 and fall.seen == 1 and fall.split == 0 and fall.obeys(GRAVITY_M_S2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_body_is_followed_to_where_it_is(side: str) -> None:
    clip = ball(4, "green", side)
    [track] = clip.tracks
    places, numbers = follow(clip.frames, "green", side, clip.pixels_per_m)
    assert np.abs(places - track.position_m).max() < 0.1 and (numbers == 1).all()
    missing, _ = follow(clip.frames, "red", side, clip.pixels_per_m)
    assert np.isnan(missing).all() and missing.shape == (17, 2)


def test_knows_another_gravity() -> None:
    clip = ball(0)
    fall = fall_of(clip, fps=clip.fps / 2)  # twice as slow is a quarter of the acceleration
    assert fall.acceleration_m_s2 == pytest.approx(GRAVITY_M_S2 / 4, rel=0.03)
    assert not fall.obeys(GRAVITY_M_S2)


@pytest.mark.parametrize("g_m_s2", [3.9, 5.9, 7.9, 9.8, 12.3, 15.7])
def test_fits_falls_that_are_seen_badly(g_m_s2: float) -> None:
    """A quarter of a metre of noise; the first frame and a tenth of the others are lost, two are far off."""
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        law = Law(rng.uniform(6.4, 8.6), rng.uniform(1.6, 2.1), g_m_s2, rng.uniform(0.6, 0.85))
        times_s = np.arange(17) / 8
        heights = law.heights(times_s) + rng.normal(0, 0.25, 17)
        heights[rng.choice(17, 2)] += 3
        seen = rng.random(17) > 0.1
        seen[0] = False
        found.append(fit_law(times_s[seen], heights[seen]).acceleration_m_s2)
    assert np.median(found) == pytest.approx(g_m_s2, rel=0.12)


def test_a_law_rests_falls_and_bounces_as_the_sandbox() -> None:
    clip = ball(1)
    [track] = clip.tracks
    law = Law(
        track.position_m[0, 1],
        clip.constants["floor_height_m"] + clip.constants["ball_radius_m"],
        clip.constants["g_m_s2"],
        clip.constants["restitution"],
    )
    assert np.abs(law.heights(np.arange(17) / clip.fps) - track.position_m[:, 1]).max() < 0.1


def test_lost_frames_do_not_lose_the_fall() -> None:
    clip = ball(0)
    gap = clip.frames.copy()
    gap[[0, 2, 9]] = 30
    fall = fall_of(replace(clip, frames=gap))
    assert fall.obeys(GRAVITY_M_S2, 0.05) and fall.seen == pytest.approx(14 / 17)


def test_what_does_not_fall_obeys_nothing() -> None:
    clip = ball(0)
    still = clip.frames[:1].repeat(17, 0)
    shuffled = clip.frames[np.random.default_rng(0).permutation(17)]
    for lost in (
        fall_of(clip, colour="blue"),
        fall_of(clip, side="right"),
        fall_of(replace(clip, frames=still)),
        fall_of(replace(clip, frames=shuffled)),
        fall_of(replace(clip, frames=clip.frames[::-1])),
    ):
        assert not lost.obeys(GRAVITY_M_S2)
    assert fall_of(clip, side="right").seen == 0
    assert fall_of(replace(clip, frames=still)).acceleration_m_s2 is None


def test_two_balls_where_one_was_are_counted() -> None:
    clip = ball(0)
    doubled = clip.frames.copy()
    doubled[5:10, :20, :20] = doubled[0, :20, :20]
    doubled[5:10, 2:10, 2:10] = COLOURS["red"]
    assert fall_of(replace(clip, frames=doubled)).split == pytest.approx(5 / 17)
