"""Does what a video shows have the shape and place of the real thing? By the nearest of some simulations."""

from collections.abc import Sequence

import numpy as np

from prophy.sandbox import BACKGROUND, Part, play_parts

_SIMULATIONS = 8


def shape_iou(frames: np.ndarray, parts: Sequence[Part], fps: float) -> float:
    """Intersection over union of what is drawn with the nearest of 8 simulations of the same parts.

    What is drawn is what is brighter than any background. A simulation draws sizes, places and speeds anew:
    true clips reach about 0.6 to 0.9, depending on how much the law leaves open.

    Args:
        frames: uint8 `[T, H, H, 3]`.
        parts: what the video was asked to show.
        fps: frame rate.
    """
    ours = drawn(frames)
    best = 0.0
    for seed in range(_SIMULATIONS):
        clip = play_parts(
            tuple(parts),
            np.random.default_rng((3, seed)),
            num_frames=len(frames),
            fps=fps,
            size=frames.shape[1],
        )
        theirs = drawn(clip.frames)
        best = max(best, float((ours & theirs).sum() / max((ours | theirs).sum(), 1)))
    return best


def drawn(frames: np.ndarray) -> np.ndarray:
    """Where frames, uint8 `[T, H, W, 3]`, are brighter than any background: bool `[T, H, W]`."""
    return frames.max(-1) > BACKGROUND[1]
