"""Wrong captions for a clip: what a model that reads its text must find less likely."""

from collections.abc import Sequence

import numpy as np

from prophy.sandbox import COLOURS, PHENOMENA, SCENES, Part, describe


def wrong_captions(parts: Sequence[Part], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A caption of a clip, and the same words with one thing wrong.

    Two parts exchange what is wrong; one part alone gets another side or colour. What a clip shows over the
    whole frame has no side.

    Args:
        parts: the clip's.
        rng: draws the wording, and what takes the place of what is right.

    Returns:
        The right caption, and wrong ones by what is wrong: `sides`, `colours`, `phenomenon`.
    """
    parts = tuple(parts)
    wording = int(rng.integers(len(describe(parts))))

    def say(changed: Sequence[Part]) -> str:
        return describe(tuple(changed))[wording]

    wrong: dict[str, Sequence[Part]] = {}
    if len(parts) == 2:
        left, right = parts
        wrong["sides"] = [
            Part(left.scene, left.colour, right.side),
            Part(right.scene, right.colour, left.side),
        ]
        if left.colour != right.colour:
            wrong["colours"] = [
                Part(left.scene, right.colour, left.side),
                Part(right.scene, left.colour, right.side),
            ]
    else:
        [part] = parts
        others = [colour for colour in COLOURS if colour != part.colour]
        wrong["colours"] = [Part(part.scene, others[rng.integers(len(others))], part.side)]
        if part.side != "middle":
            side = {"left": "right", "right": "left"}[part.side]
            wrong["sides"] = [Part(part.scene, part.colour, side)]
    replaced = int(rng.integers(len(parts)))
    shown = {part.phenomenon for part in parts}
    absent = [phenomenon for phenomenon in PHENOMENA if phenomenon not in shown]
    phenomenon = absent[rng.integers(len(absent))]
    scenes = [scene for scene in SCENES if scene.phenomenon is phenomenon]
    scene = scenes[rng.integers(len(scenes))]
    wrong["phenomenon"] = [
        Part(scene, part.colour, part.side) if index == replaced else part for index, part in enumerate(parts)
    ]
    return say(parts), {name: say(changed) for name, changed in wrong.items()}
