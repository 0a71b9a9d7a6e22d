"""Scenes of dynamics: bodies, springs and liquids, moved by the engine pymunk."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pymunk

from prophy.sandbox.drawing import FLOOR_M, GREY, WHITE, Canvas, Colour, mix
from prophy.sandbox.scene import GRAVITY_M_S2, Outcome, scene
from prophy.taxonomy import Phenomenon


def _space(gravity: float = GRAVITY_M_S2) -> pymunk.Space:
    space = pymunk.Space()
    space.gravity = (0, -gravity)
    space.collision_slop = 0.005
    return space


def _walls(space: pymunk.Space, *corners: tuple[float, float], friction: float = 0.0) -> None:
    """Fixed, perfectly elastic walls along `corners`, solid to the right of that way."""
    thickness = 0.5
    for start, end in pairwise(pymunk.Vec2d(*corner) for corner in corners):
        shift = -thickness * (end - start).normalized().perpendicular()
        wall = pymunk.Segment(space.static_body, start + shift, end + shift, thickness)
        wall.elasticity, wall.friction = 1.0, friction
        space.add(wall)


def _ball(
    space: pymunk.Space,
    position: tuple[float, float],
    radius: float,
    mass: float = 1.0,
    elasticity: float = 0.0,
) -> pymunk.Body:
    body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, radius))
    body.position = position
    shape = pymunk.Circle(body, radius)
    shape.elasticity = elasticity
    space.add(body, shape)
    return body


def _steps(times_s: np.ndarray, steps_per_s: float) -> Iterator[tuple[float, bool]]:
    """From time 0 through all of `times_s`: the length of each step, and whether it ends at one of them."""
    for elapsed in np.diff(times_s, prepend=0.0):
        num_steps = max(int(np.ceil(elapsed * steps_per_s)), 1)
        for step in range(num_steps):
            yield elapsed / num_steps, step == num_steps - 1


def _record(
    space: pymunk.Space,
    times_s: np.ndarray,
    observe: Callable[[], list[tuple[float, ...]]],
    steps_per_s: float = 960.0,
) -> np.ndarray:
    """Runs the engine and observes it at each time: `[T, N, ...]`."""
    seen = []
    for step_s, is_frame in _steps(times_s, steps_per_s):
        space.step(step_s)
        if is_frame:
            seen.append(observe())
    return np.array(seen)


def _paint_ball(
    canvas: Canvas, track: np.ndarray, radius: float, colour: Colour, masked: bool = True
) -> None:
    x, y = track.T
    canvas.paint(canvas.disc(x, y, radius), colour, masked=masked)
    canvas.paint(canvas.disc(x - 0.35 * radius, y + 0.35 * radius, 0.2 * radius), mix(colour, WHITE, 0.5))


@scene(
    Phenomenon.COLLISION,
    "a {colour} ball falls and bounces",
    "a {colour} ball drops and bounces off the floor",
    "a falling {colour} ball bounces on the floor",
)
def bouncing_ball(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A ball falls from rest: y = y0 - g t^2 / 2. At each impact its vertical velocity v becomes -e v."""
    radius, restitution = rng.uniform(0.8, 1.1), rng.uniform(0.6, 0.85)
    drift = rng.uniform(-0.5, 0.5)
    start = (rng.uniform(-0.4, 0.4) - drift, rng.uniform(6.4, 8.6))
    space = _space()
    _walls(space, (-50, FLOOR_M), (50, FLOOR_M))
    ball = _ball(space, start, radius, elasticity=restitution)
    ball.velocity = (drift, 0)
    track = _record(space, canvas.times_s, lambda: [ball.position])[:, 0]

    canvas.floor()
    _paint_ball(canvas, track, radius, colour)
    near = track[:, 1] - radius - FLOOR_M < 0.5
    region = canvas.box(track[:, 0] - radius, track[:, 0] + radius, FLOOR_M - 0.4, FLOOR_M + 0.5)
    canvas.mask |= (region < 0) & near[:, None, None]
    return {"ball": track}, {
        "g_m_s2": GRAVITY_M_S2,
        "restitution": restitution,
        "ball_radius_m": radius,
        "floor_height_m": FLOOR_M,
    }


@scene(
    Phenomenon.LIQUID_MOTION,
    "{colour} liquid pours into a tank",
    "{colour} liquid flows from a tap",
    "a tap fills a tank with {colour} liquid",
)
def pouring_liquid(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """Particles leave a tap at a constant rate, fall by g and fill a tank: volume = flow x time.

    Each particle stands for the area of its hexagonal cell, times one metre of depth; none is lost.
    """
    radius, abreast, speed, nozzle = 0.19, 3, 4.0, 8.4
    row_every_s, already_s = 2 * radius / speed, 0.5
    half = min(0.84 * canvas.half_width, 2.4) * rng.uniform(0.85, 1.0)
    tap = rng.uniform(-0.35, 0.35) * half
    space = _space()
    _walls(space, (-half, 12), (-half, FLOOR_M), (half, FLOOR_M), (half, 12))

    drops: list[pymunk.Body] = []
    seen, time_s = [], 0.0
    for step_s, is_frame in _steps(canvas.times_s + already_s, 240):
        while len(drops) * row_every_s <= abreast * time_s:
            for column in range(abreast):
                offset = 2.05 * radius * (column - (abreast - 1) / 2) + rng.uniform(-0.02, 0.02)
                drops.append(_ball(space, (tap + offset, nozzle), radius))
                drops[-1].velocity = (0, -speed)
        space.step(step_s)
        time_s += step_s
        if is_frame:
            seen.append(np.array([(*drop.position, drop.velocity.y) for drop in drops]))
    states = np.full((len(seen), len(drops), 3), -99.0)  # drops still to come are far below the frame
    for frame, state in zip(states, seen, strict=True):
        frame[: len(state)] = state

    # A fast drop is drawn long, as the piece of the jet that it stands for.
    length = np.maximum(1.2 * radius, 0.5 * row_every_s * -states[..., 2])
    field = canvas.blobs(states[..., :2], 1.2 * radius, length)
    canvas.blend(np.clip(2.0 * (field - 0.45) + 0.5, 0, 1), colour, masked_above=0.5)
    canvas.tank(half, 6.0)
    canvas.paint(canvas.box(tap - 0.8, tap + 0.8, nozzle, 12), GREY)
    centre = np.array([state[:, :2].mean(0) for state in seen])
    return {"liquid": centre}, {
        "g_m_s2": GRAVITY_M_S2,
        "flow_m3_s": abreast * 2 * np.sqrt(3) * radius**2 / row_every_s,
        "tank_width_m": 2 * half,
        "poured_before_s": already_s,
    }


SCENES = (bouncing_ball, pouring_liquid)
