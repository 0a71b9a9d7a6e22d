"""Scenes of bodies and springs."""

import numpy as np
import pymunk

from prophy.sandbox.drawing import DARK, FLOOR_M, GREY, WHITE, Canvas, Colour, Length, mix
from prophy.sandbox.engine import add_ball, add_walls, new_space, record
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import GRAVITY_M_S2, Outcome, gravity_m_s2, scene, slowness


def _paint_ball(
    canvas: Canvas, track: np.ndarray, radius: Length, colour: Colour, opacity: Length = 1.0
) -> None:
    x, y = track.T
    canvas.paint(canvas.disc(x, y, radius), colour, opacity, masked=True)
    shine = canvas.disc(x - 0.35 * radius, y + 0.35 * radius, 0.2 * radius)
    canvas.paint(shine, mix(colour, WHITE, 0.5), opacity)


def _turn_back(arbiter: pymunk.Arbiter) -> None:
    """Turns the common motion of two bodies that meet around; how fast they part stays as it is."""
    if arbiter.is_first_contact:
        one, other = arbiter.bodies
        common = (one.mass * one.velocity + other.mass * other.velocity) / (one.mass + other.mass)
        for body in arbiter.bodies:
            body.velocity -= 2 * common


@scene(
    Phenomenon.COLLISION,
    "a {colour} ball falls and bounces",
    "a {colour} ball drops and bounces back",
    "a falling {colour} ball bounces on the floor",
    laws=(Law.GRAVITY, Law.RESTITUTION, Law.PERMANENCE, Law.ONENESS),
)
def bouncing_ball(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A ball falls from rest: y = y0 - g t^2 / 2. At each impact its vertical velocity v becomes -e v."""
    radius, restitution = rng.uniform(0.8, 1.1), rng.uniform(0.6, 0.85)
    drift = rng.uniform(-0.5, 0.5)
    start = (rng.uniform(-0.4, 0.4) - drift, rng.uniform(6.4, 8.6))
    restitution = 1.15 if broken is Law.RESTITUTION else restitution
    space = new_space(gravity_m_s2(broken))
    add_walls(space, (-50, FLOOR_M), (50, FLOOR_M))
    ball = add_ball(space, start, radius, elasticity=restitution)
    ball.velocity = (drift, 0)
    track = record(space, canvas.times_s, lambda: [ball.position])[:, 0]

    canvas.floor()
    later_s = np.maximum(canvas.times_s - canvas.times_s[-1] / 2, 0)  # since it vanished, or became two
    seen = np.where((later_s > 0) & (broken is Law.PERMANENCE), 0.0, 1.0)
    if broken is Law.ONENESS:
        apart_m_s = 1.5 / slowness(canvas.times_s)
        size, apart = (
            np.where(later_s > 0, np.sqrt(0.5), 1) * radius,
            apart_m_s * later_s[:, None] * [1.0, 0.0],
        )
        _paint_ball(canvas, track - apart, size, colour)
        _paint_ball(canvas, track + apart, size, colour, opacity=later_s > 0)
    else:
        _paint_ball(canvas, track, radius, colour, seen)
    near = (track[:, 1] - radius - FLOOR_M < 0.5) & (seen > 0)
    region = canvas.box(track[:, 0] - radius, track[:, 0] + radius, FLOOR_M - 0.4, FLOOR_M + 0.5)
    canvas.mask |= (region < 0) & near[:, None, None]
    return {"ball": track}, {
        "g_m_s2": gravity_m_s2(broken),
        "restitution": restitution,
        "ball_radius_m": radius,
        "floor_height_m": FLOOR_M,
    }


@scene(
    Phenomenon.COLLISION,
    "a {colour} ball hits a white ball",
    "a {colour} ball strikes a white ball",
    "a {colour} ball and a white ball collide",
    laws=(Law.RESTITUTION, Law.MOMENTUM),
)
def striking_ball(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Seen from above, no friction: m1 v1 + m2 v2 stays, and the closing speed becomes -e times itself."""
    radii, restitution = rng.uniform(0.8, 1.0, 2), rng.uniform(0.85, 1.0)
    restitution = 2.5 if broken is Law.RESTITUTION else restitution
    masses = radii**2
    way, speed = rng.choice([-1.0, 1.0]), rng.uniform(3.5, 4.5)
    space = new_space(gravity=0.0)
    start = (rng.uniform(-0.5, 0.5), 5 - way * rng.uniform(3.8, 4.2))
    balls = [
        add_ball(space, start, radii[0], masses[0], np.sqrt(restitution)),
        add_ball(space, (0, 5 + way * rng.uniform(-0.3, 0.6)), radii[1], masses[1], np.sqrt(restitution)),
    ]
    balls[0].velocity = (0, way * speed)
    if broken is Law.MOMENTUM:
        space.on_collision(post_solve=lambda arbiter, *_: _turn_back(arbiter))
    tracks = record(space, canvas.times_s, lambda: [ball.position for ball in balls]).swapaxes(0, 1)

    for track, radius, tint in zip(tracks, radii, (colour, WHITE), strict=True):
        _paint_ball(canvas, track, radius, tint)
    return dict(zip(("striking_ball", "struck_ball"), tracks, strict=True)), {
        "striking_mass_kg": masses[0],
        "struck_mass_kg": masses[1],
        "restitution": restitution,
    }


@scene(
    Phenomenon.RIGID_BODY_MOTION,
    "a {colour} pendulum swings",
    "a {colour} ball swings on a rod",
    "a swinging {colour} pendulum",
    laws=(Law.GRAVITY,),
)
def pendulum(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A bob on a light rod of length L: angle'' = -(g / L) sin(angle), so v^2 / 2 + g y stays."""
    radius, length, pivot = rng.uniform(0.85, 1.05), rng.uniform(3.0, 5.0), (0.0, 9.0)
    reach = min(canvas.half_width - radius, 0.7 * length)
    angle = np.arcsin(reach / length) * rng.uniform(0.85, 1.0) * rng.choice([-1.0, 1.0])
    space = new_space(gravity_m_s2(broken))
    bob = add_ball(space, (length * np.sin(angle), pivot[1] - length * np.cos(angle)), radius)
    space.add(pymunk.PinJoint(space.static_body, bob, pivot))
    track = record(space, canvas.times_s, lambda: [bob.position])[:, 0]

    canvas.paint(canvas.line((-1.2, 9.1), (1.2, 9.1), 0.4), GREY)
    canvas.paint(canvas.line(pivot, tuple(track.T), 0.22), mix(GREY, WHITE, 0.4), masked=True)
    _paint_ball(canvas, track, radius, colour)
    return {"bob": track}, {
        "g_m_s2": gravity_m_s2(broken),
        "pendulum_length_m": length,
        "release_angle_rad": angle,
    }


@scene(
    Phenomenon.RIGID_BODY_MOTION,
    "a {colour} wheel rolls down a slope",
    "a {colour} wheel rolls downhill",
    "a rolling {colour} wheel on a slope",
    laws=(Law.GRAVITY, Law.ROLLING),
)
def rolling_wheel(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A solid disc rolls without slipping: a = (2/3) g sin(slope), angular speed = speed / radius."""
    radius, slope, way = rng.uniform(1.0, 1.3), rng.uniform(0.17, 0.25), rng.choice([-1.0, 1.0])
    height = rng.uniform(2.5, 4.5)
    down = np.array([way * np.cos(slope), -np.sin(slope)])
    normal = np.array([way * np.sin(slope), np.cos(slope)])
    space = new_space(gravity_m_s2(broken))
    ends = sorted((np.array([0, height]) + far * down for far in (-50, 50)), key=lambda end: end[0])
    add_walls(space, *map(tuple, ends), friction=1.0)
    wheel = add_ball(
        space, tuple(np.array([0, height]) - (canvas.half_width - 1) * down + radius * normal), radius
    )
    next(iter(wheel.shapes)).friction = 1.0
    states = record(space, canvas.times_s, lambda: [(*wheel.position, wheel.angle)])[:, 0]
    track, angle = states[:, :2], states[:, 2:] * (-1 if broken is Law.ROLLING else 1)

    canvas.paint(
        (canvas.x * np.float32(normal[0]) + (canvas.y - np.float32(height)) * np.float32(normal[1])), GREY
    )
    canvas.paint(canvas.disc(track[:, 0], track[:, 1], radius), colour, masked=True)
    for turn in (0, np.pi / 2):
        spoke = 0.8 * radius * np.concatenate([np.cos(angle + turn), np.sin(angle + turn)], 1)
        canvas.paint(canvas.line(tuple((track - spoke).T), tuple((track + spoke).T), 0.25), DARK)
    return {"wheel": track}, {
        "g_m_s2": gravity_m_s2(broken),
        "slope_rad": slope,
        "wheel_radius_m": radius,
    }


@scene(
    Phenomenon.ELASTIC_MOTION,
    "a {colour} block bounces on a spring",
    "a {colour} block swings on a spring",
    "a spring moves a {colour} block up and down",
    laws=(Law.ENERGY,),
)
def block_on_spring(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A mass m on a spring of stiffness k: it swings around its rest with period 2 pi sqrt(m / k)."""
    size, mass, period = rng.uniform(1.7, 2.2), rng.uniform(1.0, 3.0), rng.uniform(0.9, 1.4)
    stiffness, top, natural = mass * (2 * np.pi / period) ** 2, 9.2, 3.0
    rest = top - natural - mass * GRAVITY_M_S2 / stiffness
    damping = -1.2 * mass / slowness(canvas.times_s) if broken is Law.ENERGY else 0.0  # twice after 1.2 s
    x = rng.uniform(-0.15, 0.15) * canvas.half_width
    space = new_space()
    block = pymunk.Body(mass, float("inf"))
    block.position = (x, rest - rng.uniform(1.0, 1.5) * rng.choice([-1.0, 1.0]))
    ends = (space.static_body, block, (x, top), (0, 0))
    space.add(block, pymunk.DampedSpring(*ends, natural, stiffness, damping))
    track = record(space, canvas.times_s, lambda: [block.position])[:, 0]

    upper = track[:, 1] + size / 2
    turns = 4.5 * (1 - canvas.share_up(upper, top))
    zigzag = 0.6 * (4 * np.abs(turns % 1 - 0.5) - 1)
    wire = np.maximum(np.abs(canvas.x - np.float32(x) - zigzag) - 0.16, canvas.box(-9, 9, upper, top))
    canvas.paint(wire, mix(GREY, WHITE, 0.6), masked=True)
    canvas.paint(canvas.box(x - 1.4, x + 1.4, top, top + 0.5), GREY)
    canvas.paint(canvas.box(x - size / 2, x + size / 2, track[:, 1] - size / 2, upper), colour, masked=True)
    return {"block": track}, {
        "g_m_s2": GRAVITY_M_S2,
        "block_mass_kg": mass,
        "stiffness_n_m": stiffness,
        "rest_height_m": rest,
    }


@scene(
    Phenomenon.ELASTIC_MOTION,
    "a {colour} jelly falls and wobbles",
    "a {colour} jelly wobbles on the floor",
    "a wobbling {colour} jelly",
    laws=(Law.GRAVITY,),
)
def jelly(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Masses joined by Hooke's springs: in the air their centre falls by g, on the floor they wobble."""
    rows, columns, gap = 4, 5, 0.6
    stiffness, damping = rng.uniform(110, 180), 0.8
    corner = (rng.uniform(-0.2, 0.2) - gap * (columns - 1) / 2, rng.uniform(3.2, 4.6))
    space = new_space(gravity_m_s2(broken))
    add_walls(space, (-50, FLOOR_M), (50, FLOOR_M), friction=0.6)
    nodes = {
        (i, j): add_ball(space, (corner[0] + gap * i, corner[1] + gap * j), 0.3, 0.25)
        for i in range(columns)
        for j in range(rows)
    }
    for shape in space.shapes:
        shape.filter = pymunk.ShapeFilter(group=1 if shape.body in nodes.values() else 0)
    for (i, j), node in nodes.items():
        for other in filter(None, (nodes.get((i + a, j + b)) for a, b in ((1, 0), (0, 1), (1, 1), (1, -1)))):
            length = node.position.get_distance(other.position)
            space.add(pymunk.DampedSpring(node, other, (0, 0), (0, 0), length, stiffness, damping))
    states = record(space, canvas.times_s, lambda: [node.position for node in nodes.values()], 480)

    canvas.floor()
    field = canvas.blobs(states, 0.36, 0.36)
    canvas.blend(np.clip(2.5 * (field - 0.6) + 0.5, 0, 1), colour, masked_above=0.5)
    return {"jelly": states.mean(1)}, {
        "g_m_s2": gravity_m_s2(broken),
        "spring_stiffness_n_m": stiffness,
        "jelly_mass_kg": 0.25 * rows * columns,
    }


SCENES = (
    bouncing_ball,
    striking_ball,
    pendulum,
    rolling_wheel,
    block_on_spring,
    jelly,
)
