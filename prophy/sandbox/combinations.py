"""Every combination that is never in a clip of the train split, once."""

import numpy as np

from prophy.sandbox.clip import SCENES
from prophy.sandbox.drawing import COLOURS
from prophy.sandbox.phenomena import PHENOMENA, Phenomenon
from prophy.sandbox.scene import Part, Scene
from prophy.sandbox.splits import HELD_OUT_PAIRS, HELD_OUT_TRIPLES


def held_out_combinations() -> list[tuple[Part, ...]]:
    """Every held-out (phenomenon, colour, side) in each of its scenes, then every held-out pair both ways."""
    combinations: list[tuple[Part, ...]] = [
        (Part(scene, colour, side),)
        for phenomenon in PHENOMENA
        for scene in _scenes(phenomenon)
        for colour, side in sorted(HELD_OUT_TRIPLES[phenomenon])
    ]
    rng = np.random.default_rng(0)
    for pair in sorted(map(sorted, HELD_OUT_PAIRS)):
        for order in (pair, pair[::-1]):
            scenes = [_scenes(Phenomenon(name)) for name in order]
            chosen = [of_one[rng.integers(len(of_one))] for of_one in scenes]
            colours = rng.choice(list(COLOURS), 2)
            combinations.append(tuple(map(Part, chosen, map(str, colours), ("left", "right"))))
    return combinations


def _scenes(phenomenon: Phenomenon) -> list[Scene]:
    return [scene for scene in SCENES if scene.phenomenon is phenomenon]
