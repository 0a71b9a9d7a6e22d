"""What a scene is: a phenomenon, the words for it, and a function that plays it on a canvas.

A scene's function states its law in its docstring, computes the motion, paints it, and returns the true
tracks (in the canvas's metres, float64 `[T, 2]`) and the constants of the law (SI, the key carries the unit).
Its last argument is a law to break, or None. That changes nothing else: it draws the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

import numpy as np

from prophy.sandbox.drawing import COLOURS, Canvas, Colour
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import Phenomenon

Outcome: TypeAlias = tuple[dict[str, np.ndarray], dict[str, float]]
Play: TypeAlias = Callable[[Canvas, np.random.Generator, Colour, Law | None], Outcome]

GRAVITY_M_S2 = 9.81

SIDES: dict[str, tuple[float, float]] = {"left": (0.0, 0.5), "right": (0.5, 1.0), "middle": (0.0, 1.0)}
"""Where a scene can happen: from and to which share of the frame's width."""

_UNSLOWED_S = 3.0
_SIDE_WORDS = {"left": " on the left", "right": " on the right", "middle": ""}


def gravity_m_s2(broken: Law | None) -> float:
    """The g of a clip that breaks this law, or none."""
    return 0.4 * GRAVITY_M_S2 if broken is Law.GRAVITY else GRAVITY_M_S2


def slowness(times_s: np.ndarray) -> float:
    """How much slower what ends goes in a clip of more than 3 s, so that it ends after the clip; else 1."""
    return max(1.0, float(times_s[-1]) / _UNSLOWED_S)


@dataclass(frozen=True)
class Scene:
    """One way in which a phenomenon shows.

    Attributes:
        name: the function's name.
        phenomenon: its label.
        wordings: sentences without a side, each with the field `{colour}`.
        laws: those that it can break.
        play: paints the scene and returns its tracks and constants.
    """

    name: str
    phenomenon: Phenomenon
    wordings: tuple[str, ...]
    laws: tuple[Law, ...]
    play: Play

    def __reduce__(self) -> tuple[Callable[[str, str], "Scene"], tuple[str, str]]:
        # Its module knows the function's name as this scene, so the function itself cannot be pickled.
        return _find_scene, (self.play.__module__, self.name)


def _find_scene(module: str, name: str) -> Scene:
    return getattr(import_module(module), name)


def scene(phenomenon: Phenomenon, *wordings: str, laws: tuple[Law, ...]) -> Callable[[Play], Scene]:
    """Makes a function a scene of `phenomenon`."""
    return lambda play: Scene(play.__name__, phenomenon, wordings, laws, play)


@dataclass(frozen=True)
class Part:
    """A scene in a clip, by what a caption says of it: which, in which colour, on which side."""

    scene: Scene
    colour: str
    side: str

    @property
    def phenomenon(self) -> Phenomenon:
        """What happens."""
        return self.scene.phenomenon


def describe(parts: tuple[Part, ...]) -> tuple[str, ...]:
    """All captions of a clip: each wording of each part, in each order."""
    captions = [""]
    for part in parts:
        said = [
            wording.format(colour=part.colour) + _SIDE_WORDS[part.side] for wording in part.scene.wordings
        ]
        captions = [
            joined
            for caption in captions
            for words in said
            for joined in ([f"{caption} and {words}", f"{words} and {caption}"] if caption else [words])
        ]
    return tuple(captions)


def words_of(scenes: tuple[Scene, ...]) -> tuple[str, ...]:
    """Every word that a caption of these scenes can contain, sorted."""
    captions = [
        caption
        for scene in scenes
        for colour in COLOURS
        for side in SIDES
        for caption in describe((Part(scene, colour, side),))
    ]
    return tuple(sorted({"and", *" ".join(captions).split()}))
