"""Does a generated ball fall as a ball falls? It is followed by its colour, and the whole law is fitted.

The law is the sandbox's: rest, a fall by g, and bounces. Some frames may show no ball, or a wrong place: the
fit is robust. What the law says and whether there is one ball all the time are told apart.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage, optimize

from prophy.evaluation.semantics import nearest_colour
from prophy.sandbox import COLOURS, SIDES

VIVID = 50.0
"""A pixel belongs to the ball if it is at least so vivid, and of its hue."""

SMALLEST_BALL_M2 = 0.7
"""Spots smaller than this, a third of the smallest ball of the sandbox, are not counted as balls."""

FEWEST_FRAMES = 6
"""Frames that must show the ball: two more than the law has constants."""

SHORTEST_FALL_M = 1.5
"""Something that falls less says nothing of g; the sandbox's balls fall at least 4 m."""

LARGEST_RESIDUAL_M = 0.5
"""What misses the law by more, in half of its frames, does not follow it with any g."""

_JITTER_M = 0.1
_MOST_BOUNCES = 8
_STARTS = tuple(product((3.0, 6.0, 10.0, 16.0, 25.0), (0.5, 0.8)))
_LOWEST = (0.0, 0.0, 0.5, 0.0)
_HIGHEST = (20.0, 20.0, 60.0, 1.0)  # no impact gives a ball speed


@dataclass(frozen=True)
class Fall:
    """How a ball fell.

    Attributes:
        acceleration_m_s2: downwards; None where the ball follows the law of a fall with no acceleration.
        restitution: its speed after an impact by that before; None as above.
        residual_m: median of how far the ball is from where the law puts it; None as above.
        seen: share of the frames that show a ball.
        split: share of the frames that show more than one.
    """

    acceleration_m_s2: float | None
    restitution: float | None
    residual_m: float | None
    seen: float
    split: float

    def obeys(self, g_m_s2: float, tolerance: float = 0.3) -> bool:
        """Whether the acceleration was found, and is that of the law within a share of it."""
        return self.acceleration_m_s2 is not None and abs(self.acceleration_m_s2 / g_m_s2 - 1) <= tolerance


@dataclass(frozen=True)
class Law:
    """A ball that rests at time 0, falls, and bounces.

    Attributes:
        start_m: its height at first.
        lowest_m: its height at an impact.
        acceleration_m_s2: downwards.
        restitution: its speed after an impact by that before.
    """

    start_m: float
    lowest_m: float
    acceleration_m_s2: float
    restitution: float

    def heights(self, times_s: np.ndarray) -> np.ndarray:
        """Heights in metres at times `[T]`."""
        drop, g = max(self.start_m - self.lowest_m, 0.0), self.acceleration_m_s2
        heights = self.start_m - g * times_s**2 / 2
        impact_s, speed = np.sqrt(2 * drop / g), np.sqrt(2 * g * drop)
        for _ in range(_MOST_BOUNCES):
            speed *= self.restitution
            since_s = times_s - impact_s
            heights = np.where(since_s < 0, heights, self.lowest_m + speed * since_s - g * since_s**2 / 2)
            impact_s += 2 * speed / g
        return np.where(times_s < impact_s, heights, self.lowest_m)


def fit_law(times_s: np.ndarray, heights_m: np.ndarray) -> Law:
    """The law nearest to heights `[T]` at times `[T]`: least squares, in which far ones count less."""
    start, lowest = float(heights_m[0]), float(heights_m.min())

    def missed(constants: np.ndarray) -> np.ndarray:
        return Law(*constants).heights(times_s) - heights_m

    fits = [
        optimize.least_squares(
            missed,
            np.clip((start, lowest, g, restitution), _LOWEST, _HIGHEST),
            bounds=(_LOWEST, _HIGHEST),
            loss="soft_l1",
            f_scale=_JITTER_M,
        )
        for g, restitution in _STARTS
    ]
    return Law(*map(float, min(fits, key=lambda fit: fit.cost).x))


def measure_fall(frames: np.ndarray, *, colour: str, side: str, fps: float, pixels_per_m: float) -> Fall:
    """Follows the ball of a colour on a side, and fits how it falls and bounces.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        colour: key of `COLOURS`.
        side: key of `SIDES`.
        fps: frame rate.
        pixels_per_m: scale.
    """
    places, numbers = follow(frames, colour, side, pixels_per_m)
    heights = places[:, 1]
    seen = np.isfinite(heights)
    shares = {"seen": float(seen.mean()), "split": float(np.mean(numbers > 1))}
    if seen.sum() < FEWEST_FRAMES:
        return Fall(None, None, None, **shares)
    times_s, heights = (np.arange(len(frames)) / fps)[seen], heights[seen]
    law = fit_law(times_s, heights)
    residual = float(np.median(np.abs(law.heights(times_s) - heights)))
    if law.start_m - law.heights(times_s).min() < SHORTEST_FALL_M or residual > LARGEST_RESIDUAL_M:
        return Fall(None, None, None, **shares)
    return Fall(law.acceleration_m_s2, law.restitution, residual, **shares)


def follow(frames: np.ndarray, colour: str, side: str, pixels_per_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Places `[T, 2]` of the largest spot of a colour on a side, and the numbers of spots `[T]`.

    A place is as in a track: metres from the frame's lower left corner, y up; NaN where there is no spot. The
    arguments are those of `measure_fall`.
    """
    places, numbers = [], []
    columns = slice(*(round(share * frames.shape[2]) for share in SIDES[side]))
    nearest, vividness = nearest_colour(frames[:, :, columns])
    for ball in (nearest == list(COLOURS).index(colour)) & (vividness > VIVID):
        spots, count = ndimage.label(ball)
        areas = ndimage.sum_labels(ball, spots, range(1, count + 1))
        numbers.append(int(np.sum(areas >= SMALLEST_BALL_M2 * pixels_per_m**2)))
        if not numbers[-1]:
            places.append((np.nan, np.nan))
            continue
        filled = ndimage.binary_fill_holes(spots == 1 + np.argmax(areas))
        row, column = ndimage.center_of_mass(filled)
        places.append((columns.start + column + 0.5, frames.shape[1] - 0.5 - row))
    return np.array(places) / pixels_per_m, np.array(numbers)
