"""A scene alone on a black canvas, so that a test can hold its tracks and pixels against its law."""

from dataclasses import dataclass

import numpy as np

from prophy.sandbox import COLOURS, SCENES, WORLD_M
from prophy.sandbox.drawing import Canvas

SCENES_BY_NAME = {scene.name: scene for scene in SCENES}


@dataclass
class Played:
    canvas: Canvas
    tracks: dict[str, np.ndarray]
    constants: dict[str, float]

    @property
    def times_s(self) -> np.ndarray:
        return self.canvas.times_s


def play(
    name: str, seed: int, *, fps: float = 60, duration_s: float = 2, size: int = 16, wide: bool = False
) -> Played:
    """Plays one scene in half a frame, or in a whole one."""
    times_s = np.arange(int(duration_s * fps) + 1) / fps
    frames = np.zeros((len(times_s), size, size if wide else size // 2, 3), np.float32)
    canvas = Canvas(frames, times_s, size / WORLD_M)
    rng = np.random.default_rng(seed)
    tracks, constants = SCENES_BY_NAME[name].play(canvas, rng, COLOURS["red"], None)
    return Played(canvas, tracks, constants)
