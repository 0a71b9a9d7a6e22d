"""Does a video show what its prompt asked for? Rules on pixels, no model, for clips like the sandbox's.

Each half of the frame is compared with simulated halves of every scene in every colour. The nearest one names
the scene; how often each named colour's hue occurs, compared with that scene in each colour, names the
colour. A half that is nearer to nothing than to any of them is empty.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prophy import sandbox
from prophy.hashing import sources_sha256
from prophy.sandbox import BACKGROUND, COLOURS, SCENES, SIDES, Part, Scene, play_parts
from prophy.tiny import build_once

_SOURCES = (Path(sandbox.__file__).parent, Path(__file__))
"""What decides how examples look, and verdicts by them."""

_EXAMPLES = 8  # of each scene in each colour
_EXAMPLES_FILE = "examples.npz"
_FRAMES_APART = 2
_PIXELS_APART = 4


@dataclass(frozen=True)
class Sighting:
    """What is seen in one half."""

    scene: Scene
    colour: str


@dataclass(frozen=True)
class PartVerdict:
    """What is right about one part of a prompt, on the side that it names."""

    part: Part
    phenomenon: bool
    colour: bool


class ClipJudge:
    """Says what a clip shows on either side.

    Args:
        num_frames: frames of the clips to judge.
        fps: their frame rate.
        size: their height and width in pixels.
    """

    def __init__(self, num_frames: int, fps: float, size: int) -> None:
        self._looks = [Sighting(scene, colour) for scene in SCENES for colour in COLOURS]
        shape: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "size": size}
        folder = build_once(
            "clip-judge", json.dumps([shape, sources_sha256(*_SOURCES)]), partial(_write_examples, **shape)
        )
        with np.load(folder / _EXAMPLES_FILE) as examples:
            self._pictures, self._votes = examples["pictures"], examples["votes"]

    def look(self, frames: np.ndarray) -> dict[str, Sighting | None]:
        """What frames, uint8 `[T, H, W, 3]`, show on the `left` and on the `right`."""
        return {side: self._look(half) for side, half in _halves(frames).items()}

    def judge(self, frames: np.ndarray, parts: Iterable[Part]) -> list[PartVerdict]:
        """Compares frames, uint8 `[T, H, W, 3]`, with parts that are on the left or on the right."""
        seen = self.look(frames)
        verdicts = []
        for part in parts:
            there = seen[part.side]
            right = there is not None and there.scene.phenomenon is part.phenomenon
            verdicts.append(PartVerdict(part, right, there is not None and there.colour == part.colour))
        return verdicts

    def _look(self, half: np.ndarray) -> Sighting | None:
        picture = _picture(half)
        distances = np.square(self._pictures - picture).sum(1)
        nearest = distances.argmin()
        if np.square(picture).sum() < distances[nearest]:
            return None
        scene = self._looks[nearest // _EXAMPLES].scene
        differences = np.abs(self._votes - _colour_votes(half)).sum(1)
        of_scene = [index for index, look in enumerate(self._looks) if look.scene is scene]
        return self._looks[min(of_scene, key=differences.__getitem__)]


def _write_examples(folder: Path, *, num_frames: int, fps: float, size: int) -> None:
    """Simulates every scene in every colour, which takes some 20 s; it is kept for the next judge."""
    pictures, votes = [], []
    for index, scene in enumerate(SCENES):
        for number, colour in enumerate(COLOURS):
            for example in range(_EXAMPLES):
                part, rng = Part(scene, colour, "left"), np.random.default_rng((index, number, example))
                clip = play_parts((part,), rng, num_frames=num_frames, fps=fps, size=size)
                half = _halves(clip.frames)["left"]
                pictures.append(_picture(half))
                votes.append(_colour_votes(half))
    averaged = np.reshape(votes, (len(SCENES) * len(COLOURS), _EXAMPLES, -1)).mean(1)
    np.savez(folder / _EXAMPLES_FILE, pictures=np.stack(pictures), votes=averaged)


def nearest_colour(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `COLOURS` each pixel is nearest to in hue, and how vivid it is; backgrounds are not vivid.

    Args:
        frames: uint8 `[..., 3]`.

    Returns:
        Indices `[...]`, and vividness `[...]`, 0 to about 200.
    """
    hues = _chroma(np.array(list(COLOURS.values())))
    chroma = _chroma(frames)
    nearest = (chroma @ (hues / np.linalg.norm(hues, axis=-1, keepdims=True)).T).argmax(-1)
    return nearest, np.linalg.norm(chroma, axis=-1)


def _halves(frames: np.ndarray) -> dict[str, np.ndarray]:
    width = frames.shape[2]
    return {
        side: frames[:, :, round(left * width) : round(right * width)]
        for side, (left, right) in SIDES.items()
        if side != "middle"
    }


def _foreground(frames: np.ndarray) -> np.ndarray:
    """What is brighter than any background can be."""
    return np.maximum(frames.astype(np.float32) - BACKGROUND[1], 0)


def _picture(half: np.ndarray) -> np.ndarray:
    """A coarse, flat picture of the foreground."""
    bright = _foreground(half[::_FRAMES_APART]) / (255 - BACKGROUND[1])
    frames, height, width, _ = bright.shape
    cells = (frames, height // _PIXELS_APART, _PIXELS_APART, width // _PIXELS_APART, _PIXELS_APART, 3)
    return np.sqrt(bright.reshape(cells).mean((2, 4))).ravel()


def _chroma(colours: np.ndarray) -> np.ndarray:
    bright = _foreground(colours)
    return bright - bright.min(-1, keepdims=True)


def _colour_votes(half: np.ndarray) -> np.ndarray:
    """Share of each of `COLOURS` in what is vivid."""
    nearest, vividness = nearest_colour(half)
    votes = np.bincount(nearest.ravel(), vividness.ravel(), len(COLOURS))
    return votes / max(votes.sum(), 1e-9)
