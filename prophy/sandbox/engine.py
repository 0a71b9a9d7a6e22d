"""Bodies in two dimensions, moved by the engine pymunk. Knows nothing of drawing."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pymunk

from prophy.sandbox.scene import GRAVITY_M_S2


def new_space(gravity: float = GRAVITY_M_S2) -> pymunk.Space:
    """An empty world with gravity in m/s^2."""
    space = pymunk.Space()
    space.gravity = (0, -gravity)
    space.collision_slop = 0.005
    return space


def add_walls(space: pymunk.Space, *corners: tuple[float, float], friction: float = 0.0) -> None:
    """Fixed, perfectly elastic walls along `corners`, solid to the right of that way."""
    thickness = 0.5
    for start, end in pairwise(pymunk.Vec2d(*corner) for corner in corners):
        shift = -thickness * (end - start).normalized().perpendicular()
        wall = pymunk.Segment(space.static_body, start + shift, end + shift, thickness)
        wall.elasticity, wall.friction = 1.0, friction
        space.add(wall)


def add_ball(
    space: pymunk.Space,
    position: tuple[float, float],
    radius: float,
    mass: float = 1.0,
    elasticity: float = 0.0,
) -> pymunk.Body:
    """Adds a ball that does not rub; two shapes that meet bounce with the product of their elasticities."""
    body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, radius))
    body.position = position
    shape = pymunk.Circle(body, radius)
    shape.elasticity = elasticity
    space.add(body, shape)
    return body


def steps(times_s: np.ndarray, steps_per_s: float) -> Iterator[tuple[float, bool]]:
    """From time 0 through all of `times_s`: the length of each step, and whether it ends at one of them."""
    for elapsed in np.diff(times_s, prepend=0.0):
        num_steps = max(int(np.ceil(elapsed * steps_per_s)), 1)
        for step in range(num_steps):
            yield elapsed / num_steps, step == num_steps - 1


def record(
    space: pymunk.Space,
    times_s: np.ndarray,
    observe: Callable[[], list[tuple[float, ...]]],
    steps_per_s: float = 960.0,
) -> np.ndarray:
    """Runs the engine and observes it at each time: `[T, N, ...]`."""
    seen = []
    for step_s, is_frame in steps(times_s, steps_per_s):
        space.step(step_s)
        if is_frame:
            seen.append(observe())
    return np.array(seen)
