"""Scenes of heat, gas and fire, each by one stated law."""

import numpy as np

from prophy.sandbox.drawing import DARK, FLOOR_M, WHITE, Canvas, Colour, mix, over_time
from prophy.sandbox.scene import Outcome, scene
from prophy.taxonomy import Phenomenon

FLAME: tuple[Colour, ...] = ((240, 110, 20), (255, 190, 40), (255, 240, 170))
"""Colours of a flame from its edge to its core."""


def _paint_flame(canvas: Canvas, x: float, bottom: np.ndarray, height: np.ndarray, sway: np.ndarray) -> None:
    """A drop-shaped flame on `(x, bottom)`; `sway` is how far its tip hangs over."""
    for share, colour in zip((1.0, 0.72, 0.42), FLAME, strict=True):
        top = bottom + share * height
        up = canvas.share_up(bottom, top)
        half_width = 2.0 * share**0.5 * np.sqrt(up) * (1 - up) ** 0.8
        across = np.abs(canvas.x - x - over_time(sway) * up**2) - half_width
        canvas.paint(np.maximum(across, canvas.box(-9, 9, bottom, top)), colour, masked=True)


@scene(
    Phenomenon.COMBUSTION,
    "a {colour} candle burns",
    "a flame burns on a {colour} candle",
    "a {colour} candle burns down with a flame",
)
def candle(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A candle of diameter D burns down at a constant speed; its flame puffs at f = 1.5 / sqrt(D) (pool fires)."""
    diameter, burn_speed = rng.uniform(1.6, 2.0), rng.uniform(0.4, 0.7)
    height, flame = rng.uniform(3.6, 4.6), rng.uniform(2.8, 3.4)
    frequency, phase = 1.5 / np.sqrt(diameter), rng.uniform(0, 2 * np.pi)
    x = rng.uniform(-0.15, 0.15) * canvas.half_width
    puff = 2 * np.pi * frequency * canvas.times_s + phase
    wick = FLOOR_M + height - burn_speed * canvas.times_s
    flame_height = flame * (1 + 0.2 * np.sin(puff))

    tip_sway = 0.5 * np.cos(puff)
    canvas.blend(
        canvas.blobs(np.stack([np.full_like(wick, x), wick + 1.2], 1)[:, None], 1.1, 1.6, 0.3), FLAME[1]
    )
    canvas.floor()
    canvas.paint(canvas.box(x - diameter / 2, x + diameter / 2, FLOOR_M, wick), colour)
    canvas.paint(canvas.box(x - diameter / 2, x - diameter / 4, FLOOR_M, wick), mix(colour, WHITE, 0.3))
    canvas.paint(canvas.box(x - 0.1, x + 0.1, wick, wick + 0.6), DARK)
    _paint_flame(canvas, x, wick + 0.2, flame_height, tip_sway)
    track = np.stack([np.full_like(wick, x), wick], 1)
    tip = track + np.stack([tip_sway, 0.2 + flame_height], 1)
    return {"wick": track, "flame_tip": tip}, {
        "candle_diameter_m": diameter,
        "burn_speed_m_s": burn_speed,
        "puffing_hz": frequency,
    }


SCENES = (candle,)
