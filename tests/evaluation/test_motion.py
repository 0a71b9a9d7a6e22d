from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prophy.evaluation.motion import Fall, first_fall
from prophy.sandbox import COLOURS, SCENES, Part, SimulatedClip, play_parts
from prophy.sandbox.scene import GRAVITY_M_S2

[BALL] = [scene for scene in SCENES if scene.name == "bouncing_ball"]


def fall_of(clip: SimulatedClip, **changes: Any) -> Fall:
    [part] = clip.parts
    known = {"colour": part.colour, "side": part.side, "fps": clip.fps, "pixels_per_m": clip.pixels_per_m}
    arguments: dict[str, Any] = known | changes
    return first_fall(clip.frames, **arguments)


def ball(seed: int, colour: str = "red", side: str = "left") -> SimulatedClip:
    rng = np.random.default_rng(seed)
    return play_parts((Part(BALL, colour, side),), rng, num_frames=17, fps=8.0, size=64)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_finds_g_in_simulated_falls(colour: str, side: str) -> None:
    fall = fall_of(ball(3, colour, side))
    assert fall.acceleration_m_s2 == pytest.approx(GRAVITY_M_S2, rel=0.03)
    assert fall.residual_m < 0.03 and fall.split == 0 and fall.obeys(GRAVITY_M_S2)


def test_knows_another_gravity() -> None:
    clip = ball(0)
    fall = fall_of(clip, fps=clip.fps / 2)  # twice as slow is a quarter of the acceleration
    assert fall.acceleration_m_s2 == pytest.approx(GRAVITY_M_S2 / 4, rel=0.03)
    assert not fall.obeys(GRAVITY_M_S2)


def test_what_cannot_be_followed_obeys_nothing() -> None:
    clip = ball(0)
    gap = clip.frames.copy()
    gap[2] = 30
    for lost in (
        fall_of(clip, colour="blue"),
        fall_of(clip, side="right"),
        fall_of(replace(clip, frames=gap)),
    ):
        assert lost.acceleration_m_s2 is None and not lost.obeys(GRAVITY_M_S2)
    assert fall_of(replace(clip, frames=clip.frames[:1].repeat(17, 0))).acceleration_m_s2 == pytest.approx(
        0, abs=1e-6
    )


def test_two_balls_where_one_was_are_counted() -> None:
    clip = ball(0)
    doubled = clip.frames.copy()
    doubled[5:10, :20, :20] = doubled[0, :20, :20]
    doubled[5:10, 2:10, 2:10] = COLOURS["red"]
    assert fall_of(replace(clip, frames=doubled)).split == pytest.approx(5 / 17)
