import numpy as np

from prophy.evaluation.captions import wrong_captions
from prophy.sandbox import SCENES, Part, describe

BALL, TANK = (
    next(scene for scene in SCENES if scene.name == name) for name in ("bouncing_ball", "pouring_liquid")
)


def test_of_two_parts_sides_and_colours_are_exchanged() -> None:
    parts = (Part(BALL, "red", "left"), Part(TANK, "green", "right"))
    for seed in range(20):
        right, wrong = wrong_captions(parts, np.random.default_rng(seed))
        assert wrong.keys() == {"sides", "colours", "phenomenon"}
        swapped = right.replace("left", "?").replace("right", "left").replace("?", "right")
        assert wrong["sides"] == swapped
        assert wrong["colours"] == right.replace("red", "?").replace("green", "red").replace("?", "green")
        assert sorted(wrong["sides"].split()) == sorted(right.split())


def test_of_one_part_another_side_and_colour_are_said() -> None:
    right, wrong = wrong_captions((Part(BALL, "red", "left"),), np.random.default_rng(0))
    assert wrong["sides"] == right.replace("left", "right")
    changed = [
        (said, instead)
        for said, instead in zip(right.split(), wrong["colours"].split(), strict=True)
        if said != instead
    ]
    assert [said for said, _ in changed] == ["red"]
    assert "red" in wrong["phenomenon"] and "left" in wrong["phenomenon"]


def test_what_is_not_there_is_not_exchanged() -> None:
    _, wrong = wrong_captions((Part(BALL, "red", "middle"),), np.random.default_rng(0))
    assert "sides" not in wrong
    alike = (Part(BALL, "red", "left"), Part(TANK, "red", "right"))
    _, wrong = wrong_captions(alike, np.random.default_rng(0))
    assert "colours" not in wrong


def test_a_phenomenon_that_the_clip_shows_never_takes_the_place_of_another() -> None:
    parts = (Part(BALL, "red", "left"), Part(TANK, "green", "right"))
    for seed in range(40):
        right, wrong = wrong_captions(parts, np.random.default_rng(seed))
        assert wrong["phenomenon"] != right
        kept = [part for part in parts if any(said in wrong["phenomenon"] for said in describe((part,)))]
        assert len(kept) == 1, (right, wrong["phenomenon"])
