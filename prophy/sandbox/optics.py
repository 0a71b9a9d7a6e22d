"""Scenes of light, each drawn from its law: the front of the light moves slowly enough to be seen."""

from itertools import pairwise

import numpy as np

from prophy.sandbox.drawing import GREY, WHITE, Canvas, Colour, mix
from prophy.sandbox.scene import Outcome, scene
from prophy.taxonomy import Phenomenon

BEAM_M = 0.5
"""Thickness of a beam."""


def _paint_beam(canvas: Canvas, corners: np.ndarray, arrival_s: np.ndarray, colour: Colour) -> np.ndarray:
    """A beam with a bright core along `corners` `[K, 2]`, reached at `arrival_s`; returns its front's track."""
    for thickness, tint in ((BEAM_M, colour), (0.4 * BEAM_M, mix(colour, WHITE, 0.6))):
        for (start, end), (start_s, end_s) in zip(pairwise(corners), pairwise(arrival_s), strict=True):
            share = np.clip((canvas.times_s - start_s) / (end_s - start_s), 0, 1)
            front = start + share[:, None] * (end - start)
            line = canvas.line(tuple(start), tuple(front.T), thickness)
            canvas.paint(line, tint, opacity=share > 0, masked=True)
    return np.stack([np.interp(canvas.times_s, arrival_s, axis) for axis in corners.T], 1)


def _unit(angle: float) -> np.ndarray:
    """The direction at `angle` from straight up, clockwise."""
    return np.array([np.sin(angle), np.cos(angle)])


@scene(
    Phenomenon.REFLECTION,
    "a {colour} light beam hits a mirror",
    "a mirror reflects a {colour} light beam",
    "a {colour} light beam reflects off a mirror",
)
def mirror(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A beam of direction d meets a mirror of normal n: r = d - 2 (d.n) n, so angle in = angle out."""
    side = rng.choice([-1.0, 1.0])
    tilt, speed = rng.uniform(-0.12, 0.12), rng.uniform(7.0, 9.0)
    hit = np.array([0.0, rng.uniform(1.6, 2.6)])
    start = np.array([side * rng.uniform(0.8, 0.95) * canvas.half_width, rng.uniform(7.8, 9.4)])
    normal = _unit(tilt)
    incoming = (hit - start) / np.linalg.norm(hit - start)
    outgoing = incoming - 2 * (incoming @ normal) * normal
    corners = np.stack([start, hit, hit + 12 * outgoing])
    arrival = np.cumsum([-0.15, np.linalg.norm(hit - start) / speed, 12 / speed])

    along = 0.8 * canvas.half_width * np.array([normal[1], -normal[0]])
    for depth, tint in ((0.55, GREY), (0.12, (190, 205, 220))):
        centre = hit - depth * normal
        canvas.paint(canvas.line(tuple(centre - along), tuple(centre + along), 0.5), tint)
    front = _paint_beam(canvas, corners, arrival, colour)
    return {"beam_front": front}, {
        "angle_in_rad": float(np.arccos(-incoming @ normal)),
        "mirror_tilt_rad": tilt,
        "front_speed_m_s": speed,
    }


SCENES = (mirror,)
