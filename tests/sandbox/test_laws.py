"""A clip that breaks a law differs from its twin by that law alone."""

from typing import Any

import numpy as np
import pytest

from prophy.sandbox import SCENES, WHEN_BROKEN, Law, Part, Scene, SimulatedClip, play_parts

SHAPE: dict[str, Any] = {"num_frames": 17, "fps": 8.0, "size": 64}
BREAKS = [(scene, law) for scene in SCENES for law in scene.laws]
CONSTANTS = {
    Law.GRAVITY: {"g_m_s2"},
    Law.RESTITUTION: {"restitution"},
    Law.TIME: {"melting_rate_m3_s"},
    Law.INTERFERENCE: {"fringe_spacing_m"},
}
"""Which of a clip's constants a broken law may change."""


def twins(scene: Scene, law: Law, side: str = "left") -> tuple[SimulatedClip, SimulatedClip]:
    """A clip and the same one with a broken law; both leave their generators in the same state."""
    part = Part(scene, "red", side)
    generators = np.random.default_rng(3), np.random.default_rng(3)
    true = play_parts((part,), generators[0], **SHAPE)
    broken = play_parts((part,), generators[1], **SHAPE, broken=law)
    assert generators[0].bit_generator.state == generators[1].bit_generator.state
    return true, broken


def test_every_scene_can_break_a_law_and_every_law_is_told() -> None:
    assert all(scene.laws for scene in SCENES)
    assert {law for _, law in BREAKS} == set(Law) == WHEN_BROKEN.keys()


@pytest.mark.parametrize(("scene", "law"), BREAKS, ids=lambda value: getattr(value, "name", None))
def test_twins_differ_only_by_the_law(scene: Scene, law: Law) -> None:
    true, broken = twins(scene, law)
    assert (true.caption, true.parts, true.phenomena) == (broken.caption, broken.parts, broken.phenomena)
    changed = {name for name, value in true.constants.items() if broken.constants[name] != value}
    assert true.constants.keys() == broken.constants.keys()
    assert changed <= CONSTANTS.get(law, set())
    differs = (true.frames != broken.frames).any(-1)
    assert not differs[:, :, 32:].any(), "the other half is background"
    assert differs.any((1, 2)).sum() >= 6, "it shows in many frames"
    if law is not Law.TIME:
        assert not differs[0].any(), "at first nothing has happened yet"


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_law_that_a_scene_does_not_know_changes_nothing(scene: Scene) -> None:
    true, broken = twins(scene, next(law for law in Law if law not in scene.laws))
    assert np.array_equal(true.frames, broken.frames)


def of(name: str) -> Scene:
    return next(scene for scene in SCENES if scene.name == name)


def test_broken_balls_fall_slowly_bounce_higher_vanish_and_split() -> None:
    ball = of("bouncing_ball")
    true, slow = twins(ball, Law.GRAVITY)
    fallen = [clip.tracks[0].position_m[0, 1] - clip.tracks[0].position_m[3, 1] for clip in (true, slow)]
    assert fallen[1] / fallen[0] == pytest.approx(0.4, rel=0.01)
    _, high = twins(ball, Law.RESTITUTION)
    assert high.tracks[0].position_m[5:, 1].max() > high.tracks[0].position_m[0, 1]
    red = [
        ((clip.frames[..., 0] > 150) & (clip.frames[..., 2] < 100)).sum((1, 2))
        for clip in twins(ball, Law.PERMANENCE)
    ]
    assert (red[0] > 20).all()
    assert (red[1][:9] == red[0][:9]).all() and not red[1][9:].any()
    true, split = twins(ball, Law.ONENESS)
    assert np.array_equal(true.frames[:9], split.frames[:9])


def test_balls_that_are_pushed_keep_no_momentum_and_part_as_fast_as_they_should() -> None:
    true, broken = twins(of("striking_ball"), Law.MOMENTUM)
    masses = [true.constants[name] for name in ("striking_mass_kg", "struck_mass_kg")]
    velocities = [
        np.stack([np.diff(track.position_m, axis=0) * true.fps for track in clip.tracks])
        for clip in (true, broken)
    ]
    kept, changed = (np.tensordot(masses, each, 1) for each in velocities)
    np.testing.assert_allclose(kept[-1], kept[0], atol=1e-6)
    np.testing.assert_allclose(changed[-1], -kept[0], atol=1e-6)
    closing, unbroken = (each[0] - each[1] for each in velocities[::-1])
    np.testing.assert_allclose(closing[-1], unbroken[-1], atol=1e-6)


def test_ice_that_goes_backwards_ends_as_it_began() -> None:
    true, broken = twins(of("melting_block"), Law.TIME)
    assert np.array_equal(true.frames[::-1], broken.frames)
