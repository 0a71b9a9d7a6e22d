"""One simulated clip: which scenes, where, and everything that is true of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prophy.sandbox import dynamics, matter, optics, thermodynamics
from prophy.sandbox.drawing import BACKGROUND, COLOURS, WORLD_M, Canvas
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import PHENOMENA, Phenomenon
from prophy.sandbox.scene import SIDES, Part, Scene, describe, words_of
from prophy.sandbox.splits import Split, split_of

SCENES: tuple[Scene, ...] = dynamics.SCENES + matter.SCENES + thermodynamics.SCENES + optics.SCENES

FEWEST_FRAMES = 2

_ARRANGEMENTS = (("left",), ("right",), ("middle",), ("left", "right"))
_ARRANGEMENT_SHARES = (0.2, 0.2, 0.1, 0.5)


@dataclass(frozen=True)
class Track:
    """Where one object is in each frame, whether it is visible or not.

    Attributes:
        name: the object.
        position_m: float64 `[T, 2]`, metres from the frame's lower left corner, y up.
    """

    name: str
    position_m: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ClipTruth:
    """What is true of a clip, without its frames.

    Attributes:
        fps: frame rate.
        parts: the scenes by name, colour and side, from left to right.
        caption: one of `captions`, drawn at random.
        captions: every wording, in every order.
        phenomena: what happens, in the order of `PHENOMENA`.
        masks: per phenomenon where it happens, bool `[T, H, W]`.
        tracks: the objects' true ways.
        constants: the laws' constants, in SI units; the key carries the unit.
        pixels_per_m: scale.
    """

    fps: float
    parts: tuple[Part, ...]
    caption: str
    captions: tuple[str, ...]
    phenomena: tuple[Phenomenon, ...]
    masks: dict[str, np.ndarray]
    tracks: tuple[Track, ...]
    constants: dict[str, float]
    pixels_per_m: float


@dataclass(frozen=True, kw_only=True)
class SimulatedClip(ClipTruth):
    """A clip in memory.

    Attributes:
        frames: RGB, uint8 `[T, H, W, 3]`.
    """

    frames: np.ndarray


def simulate_clip(
    seed: int,
    *,
    num_frames: int,
    fps: float,
    size: int,
    split: Split = "train",
    phenomena: Sequence[Phenomenon] = PHENOMENA,
) -> SimulatedClip:
    """Simulates one or two scenes: on the left, on the right, on both, or one over the whole frame.

    The same arguments give the same bytes.

    Args:
        seed: what varies: scenes, colours, sides, sizes, speeds, background, wording.
        num_frames: frames; the first one at time 0.
        fps: frame rate.
        size: height and width in pixels.
        split: `train` never holds a combination that `prophy.sandbox.splits` names, `held_out` always does.
        phenomena: what the scenes are drawn from.
    """
    rng = np.random.default_rng(seed)
    parts = draw_parts(rng, split, phenomena)
    return play_parts(parts, rng, num_frames=num_frames, fps=fps, size=size)


def draw_parts(
    rng: np.random.Generator, split: Split = "train", phenomena: Sequence[Phenomenon] = PHENOMENA
) -> tuple[Part, ...]:
    """Draws what a clip of this split shows, as `simulate_clip` does."""
    parts = _draw_parts(rng, phenomena)
    while split_of(parts) != split:
        parts = _draw_parts(rng, phenomena)
    return parts


def play_parts(
    parts: tuple[Part, ...],
    rng: np.random.Generator,
    *,
    num_frames: int,
    fps: float,
    size: int,
    broken: Law | None = None,
) -> SimulatedClip:
    """Simulates just these scenes.

    Args:
        parts: the scenes.
        rng: draws what they leave open.
        num_frames: as in `simulate_clip`, as are `fps` and `size`.
        fps: frame rate.
        size: height and width in pixels.
        broken: a law that these scenes break; from the same `rng` comes the same clip but for that law.

    Raises:
        ValueError: there are fewer than `FEWEST_FRAMES`.
    """
    if num_frames < FEWEST_FRAMES:
        raise ValueError(
            f"a clip has {FEWEST_FRAMES} frames or more, not {num_frames}: in one nothing happens"
        )
    times_s = np.arange(num_frames) / fps
    top, bottom = rng.uniform(*BACKGROUND, 3), rng.uniform(*BACKGROUND, 3)
    gradient = np.linspace(top, bottom, size, dtype=np.float32)[:, None]
    frames = np.tile(gradient, (num_frames, 1, size, 1))

    masks: dict[str, np.ndarray] = {}
    tracks: list[Track] = []
    constants: dict[str, float] = {}
    for part in parts:
        columns = slice(*(round(share * size) for share in SIDES[part.side]))
        canvas = Canvas(frames[:, :, columns], times_s, size / WORLD_M)
        positions, laws = part.scene.play(canvas, rng, COLOURS[part.colour], broken)
        masks[part.phenomenon] = np.zeros(frames.shape[:3], bool)
        masks[part.phenomenon][:, :, columns] = canvas.mask
        centre = np.array([(columns.start + columns.stop) / 2 / canvas.pixels_per_m, 0.0])
        tracks += [Track(name, position + centre) for name, position in positions.items()]
        constants |= laws

    captions = describe(parts)
    return SimulatedClip(
        frames=np.clip(frames + 0.5, 0, 255).astype(np.uint8),
        fps=fps,
        parts=parts,
        caption=captions[rng.integers(len(captions))],
        captions=captions,
        phenomena=tuple(phenomenon for phenomenon in PHENOMENA if phenomenon in masks),
        masks=masks,
        tracks=tuple(tracks),
        constants={key: float(value) for key, value in constants.items()},
        pixels_per_m=size / WORLD_M,
    )


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted."""
    return words_of(SCENES)


def _draw_parts(rng: np.random.Generator, phenomena: Sequence[Phenomenon]) -> tuple[Part, ...]:
    sides = _ARRANGEMENTS[rng.choice(len(_ARRANGEMENTS), p=_ARRANGEMENT_SHARES)][: len(phenomena)]
    chosen = rng.permutation(len(phenomena))[: len(sides)]
    parts = []
    for index, side in zip(chosen, sides, strict=True):
        scenes = [scene for scene in SCENES if scene.phenomenon is phenomena[index]]
        scene = scenes[rng.integers(len(scenes))]
        parts.append(Part(scene, list(COLOURS)[rng.integers(len(COLOURS))], side))
    return tuple(parts)
