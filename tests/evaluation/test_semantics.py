from typing import Any

import numpy as np
import pytest

from prophy.evaluation.semantics import ClipJudge, nearest_colour
from prophy.sandbox import COLOURS, SCENES, Part, play_parts, simulate_clip

SHAPE: dict[str, Any] = {"num_frames": 17, "fps": 8.0, "size": 64}
SCENE = {scene.name: scene for scene in SCENES}


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge(**SHAPE)


@pytest.mark.heavy
def test_sees_what_true_clips_of_untrained_combinations_show(judge: ClipJudge) -> None:
    right, count = 0, 0
    for seed in range(40):
        clip = simulate_clip(seed, split="held_out", **SHAPE)
        seen = judge.look(clip.frames)
        asked = {part.side: part for part in clip.parts}
        for side, sighting in seen.items():
            part = asked.get(side)
            found = None if sighting is None else (sighting.scene.phenomenon, sighting.colour)
            right += found == (None if part is None else (part.phenomenon, part.colour))
            count += 1
    assert right >= 0.97 * count


@pytest.mark.heavy
def test_names_what_is_wrong(judge: ClipJudge) -> None:
    left = Part(SCENE["candle"], "green", "left")
    frames = play_parts((left,), np.random.default_rng(0), **SHAPE).frames
    asked = [
        left,
        Part(SCENE["candle"], "blue", "left"),
        Part(SCENE["smoke"], "green", "left"),
        Part(SCENE["candle"], "green", "right"),
    ]
    verdicts = [(verdict.phenomenon, verdict.colour) for verdict in judge.judge(frames, asked)]
    assert verdicts == [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.heavy
def test_noise_is_not_what_was_asked(judge: ClipJudge) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    asked = [Part(scene, "red", "left") for scene in SCENES]
    assert sum(verdict.phenomenon and verdict.colour for verdict in judge.judge(noise, asked)) <= 2
    assert judge.look(np.full((17, 64, 64, 3), 40, np.uint8)) == {"left": None, "right": None}


def test_colours_are_their_own_nearest_and_backgrounds_are_not_vivid() -> None:
    nearest, vividness = nearest_colour(np.array(list(COLOURS.values()), np.uint8))
    assert nearest.tolist() == list(range(len(COLOURS))) and vividness.min() > 100
    assert nearest_colour(np.array([80, 12, 80], np.uint8))[1] == 0


@pytest.mark.heavy
def test_the_next_judge_takes_the_examples_of_the_first(judge: ClipJudge) -> None:
    again = ClipJudge(**SHAPE)
    frames = simulate_clip(1, **SHAPE).frames
    assert again.look(frames) == judge.look(frames)
