"""Does a generated ball fall as a ball falls? It is followed by its colour, and its fall is fitted.

A parabola through the heights of the first fall gives the acceleration, which the sandbox's law says is g.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from prophy.evaluation.semantics import nearest_colour
from prophy.sandbox import COLOURS, SIDES

VIVID = 50.0
"""A pixel belongs to the ball if it is at least so vivid, and of its hue."""

SMALLEST_BALL_M2 = 0.7
"""Spots smaller than this, a third of the smallest ball of the sandbox, are not counted as balls."""

SHORTEST_FALL = 5
"""Frames that a fall must have to be fitted."""


@dataclass(frozen=True)
class Fall:
    """How a ball fell first.

    Attributes:
        acceleration_m_s2: downwards; None where no fall could be followed.
        residual_m: root mean square of what the parabola misses.
        split: share of the frames that show more than one ball.
    """

    acceleration_m_s2: float | None
    residual_m: float | None
    split: float

    def obeys(self, g_m_s2: float, tolerance: float = 0.3) -> bool:
        """Whether the acceleration was found, and is that of the law within a share of it."""
        return self.acceleration_m_s2 is not None and abs(self.acceleration_m_s2 / g_m_s2 - 1) <= tolerance


def first_fall(frames: np.ndarray, *, colour: str, side: str, fps: float, pixels_per_m: float) -> Fall:
    """Follows the ball of a colour on a side until it is lowest, and fits its fall.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        colour: key of `COLOURS`.
        side: key of `SIDES`.
        fps: frame rate.
        pixels_per_m: scale.
    """
    heights, numbers = [], []
    columns = slice(*(round(share * frames.shape[2]) for share in SIDES[side]))
    nearest, vividness = nearest_colour(frames[:, :, columns])
    for ball in (nearest == list(COLOURS).index(colour)) & (vividness > VIVID):
        spots, count = ndimage.label(ball)
        areas = ndimage.sum_labels(ball, spots, range(1, count + 1))
        numbers.append(int(np.sum(areas >= SMALLEST_BALL_M2 * pixels_per_m**2)))
        if not numbers[-1]:
            heights.append(np.nan)
            continue
        filled = ndimage.binary_fill_holes(spots == 1 + np.argmax(areas))
        row, _ = ndimage.center_of_mass(filled)
        heights.append((frames.shape[1] - 0.5 - row) / pixels_per_m)

    falling = np.array(heights[: _lowest(heights)])
    split = float(np.mean(np.array(numbers) > 1))
    if len(falling) < SHORTEST_FALL or np.isnan(falling).any():
        return Fall(None, None, split)
    times_s = np.arange(len(falling)) / fps
    fit = np.polyfit(times_s, falling, 2)
    residual = float(np.sqrt(np.mean((np.polyval(fit, times_s) - falling) ** 2)))
    return Fall(float(-2 * fit[0]), residual, split)


def _lowest(heights: list[float]) -> int:
    """The first frame after which the ball rises; it may show the ball after the impact already."""
    return next((i for i in range(len(heights) - 1) if heights[i + 1] > heights[i]), len(heights))
