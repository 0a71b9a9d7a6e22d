"""Scenes of dynamics: bodies, springs, liquid and gas."""

import numpy as np
import pymunk

from prophy.sandbox.drawing import DARK, FLOOR_M, GREY, WHITE, Canvas, Colour, mix, over_time
from prophy.sandbox.engine import add_ball, add_walls, new_space, record, steps
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import GRAVITY_M_S2, Outcome, scene


def _paint_ball(
    canvas: Canvas, track: np.ndarray, radius: float, colour: Colour, masked: bool = True
) -> None:
    x, y = track.T
    canvas.paint(canvas.disc(x, y, radius), colour, masked=masked)
    canvas.paint(canvas.disc(x - 0.35 * radius, y + 0.35 * radius, 0.2 * radius), mix(colour, WHITE, 0.5))


@scene(
    Phenomenon.COLLISION,
    "a {colour} ball falls and bounces",
    "a {colour} ball drops and bounces back",
    "a falling {colour} ball bounces on the floor",
)
def bouncing_ball(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A ball falls from rest: y = y0 - g t^2 / 2. At each impact its vertical velocity v becomes -e v."""
    radius, restitution = rng.uniform(0.8, 1.1), rng.uniform(0.6, 0.85)
    drift = rng.uniform(-0.5, 0.5)
    start = (rng.uniform(-0.4, 0.4) - drift, rng.uniform(6.4, 8.6))
    space = new_space()
    add_walls(space, (-50, FLOOR_M), (50, FLOOR_M))
    ball = add_ball(space, start, radius, elasticity=restitution)
    ball.velocity = (drift, 0)
    track = record(space, canvas.times_s, lambda: [ball.position])[:, 0]

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
    Phenomenon.COLLISION,
    "a {colour} ball hits a white ball",
    "a {colour} ball strikes a white ball",
    "a {colour} ball and a white ball collide",
)
def striking_ball(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """Seen from above, no friction: m1 v1 + m2 v2 stays, and the closing speed becomes -e times itself."""
    radii, restitution = rng.uniform(0.8, 1.0, 2), rng.uniform(0.85, 1.0)
    masses = radii**2
    way, speed = rng.choice([-1.0, 1.0]), rng.uniform(3.5, 4.5)
    space = new_space(gravity=0.0)
    start = (rng.uniform(-0.5, 0.5), 5 - way * rng.uniform(3.8, 4.2))
    balls = [
        add_ball(space, start, radii[0], masses[0], np.sqrt(restitution)),
        add_ball(space, (0, 5 + way * rng.uniform(-0.3, 0.6)), radii[1], masses[1], np.sqrt(restitution)),
    ]
    balls[0].velocity = (0, way * speed)
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
)
def pendulum(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A bob on a light rod of length L: angle'' = -(g / L) sin(angle), so v^2 / 2 + g y stays."""
    radius, length, pivot = rng.uniform(0.85, 1.05), rng.uniform(3.0, 5.0), (0.0, 9.0)
    reach = min(canvas.half_width - radius, 0.7 * length)
    angle = np.arcsin(reach / length) * rng.uniform(0.85, 1.0) * rng.choice([-1.0, 1.0])
    space = new_space()
    bob = add_ball(space, (length * np.sin(angle), pivot[1] - length * np.cos(angle)), radius)
    space.add(pymunk.PinJoint(space.static_body, bob, pivot))
    track = record(space, canvas.times_s, lambda: [bob.position])[:, 0]

    canvas.paint(canvas.line((-1.2, 9.1), (1.2, 9.1), 0.4), GREY)
    canvas.paint(canvas.line(pivot, tuple(track.T), 0.22), mix(GREY, WHITE, 0.4), masked=True)
    _paint_ball(canvas, track, radius, colour)
    return {"bob": track}, {"g_m_s2": GRAVITY_M_S2, "pendulum_length_m": length, "release_angle_rad": angle}


@scene(
    Phenomenon.RIGID_BODY_MOTION,
    "a {colour} wheel rolls down a slope",
    "a {colour} wheel rolls downhill",
    "a rolling {colour} wheel on a slope",
)
def rolling_wheel(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A solid disc rolls without slipping: a = (2/3) g sin(slope), angular speed = speed / radius."""
    radius, slope, way = rng.uniform(1.0, 1.3), rng.uniform(0.17, 0.25), rng.choice([-1.0, 1.0])
    height = rng.uniform(2.5, 4.5)
    down = np.array([way * np.cos(slope), -np.sin(slope)])
    normal = np.array([way * np.sin(slope), np.cos(slope)])
    space = new_space()
    ends = sorted((np.array([0, height]) + far * down for far in (-50, 50)), key=lambda end: end[0])
    add_walls(space, *map(tuple, ends), friction=1.0)
    wheel = add_ball(
        space, tuple(np.array([0, height]) - (canvas.half_width - 1) * down + radius * normal), radius
    )
    next(iter(wheel.shapes)).friction = 1.0
    states = record(space, canvas.times_s, lambda: [(*wheel.position, wheel.angle)])[:, 0]
    track, angle = states[:, :2], states[:, 2:]

    canvas.paint(
        (canvas.x * np.float32(normal[0]) + (canvas.y - np.float32(height)) * np.float32(normal[1])), GREY
    )
    canvas.paint(canvas.disc(track[:, 0], track[:, 1], radius), colour, masked=True)
    for turn in (0, np.pi / 2):
        spoke = 0.8 * radius * np.concatenate([np.cos(angle + turn), np.sin(angle + turn)], 1)
        canvas.paint(canvas.line(tuple((track - spoke).T), tuple((track + spoke).T), 0.25), DARK)
    return {"wheel": track}, {"g_m_s2": GRAVITY_M_S2, "slope_rad": slope, "wheel_radius_m": radius}


@scene(
    Phenomenon.ELASTIC_MOTION,
    "a {colour} block bounces on a spring",
    "a {colour} block swings on a spring",
    "a spring moves a {colour} block up and down",
)
def block_on_spring(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A mass m on a spring of stiffness k: it swings around its rest with period 2 pi sqrt(m / k)."""
    size, mass, period = rng.uniform(1.7, 2.2), rng.uniform(1.0, 3.0), rng.uniform(0.9, 1.4)
    stiffness, top, natural = mass * (2 * np.pi / period) ** 2, 9.2, 3.0
    rest = top - natural - mass * GRAVITY_M_S2 / stiffness
    x = rng.uniform(-0.15, 0.15) * canvas.half_width
    space = new_space()
    block = pymunk.Body(mass, float("inf"))
    block.position = (x, rest - rng.uniform(1.0, 1.5) * rng.choice([-1.0, 1.0]))
    space.add(block, pymunk.DampedSpring(space.static_body, block, (x, top), (0, 0), natural, stiffness, 0.0))
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
)
def jelly(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """Masses joined by Hooke's springs: in the air their centre falls by g, on the floor they wobble."""
    rows, columns, gap = 4, 5, 0.6
    stiffness, damping = rng.uniform(110, 180), 0.8
    corner = (rng.uniform(-0.2, 0.2) - gap * (columns - 1) / 2, rng.uniform(3.2, 4.6))
    space = new_space()
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
        "g_m_s2": GRAVITY_M_S2,
        "spring_stiffness_n_m": stiffness,
        "jelly_mass_kg": 0.25 * rows * columns,
    }


@scene(
    Phenomenon.LIQUID_MOTION,
    "{colour} liquid pours into a tank",
    "{colour} liquid flows from a tap",
    "a tap fills a tank with {colour} liquid",
)
def pouring_liquid(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """Particles leave an open tap at a constant rate, fall by g and stay in a tank: volume = flow x time.

    Each particle stands for the area that it takes in a random packing (density 0.82), one metre deep.
    """
    radius, abreast, speed, nozzle = 0.19, 3, 4.0, 8.4
    row_every_s, already_s, open_s = 2 * radius / speed, 0.5, rng.uniform(1.7, 2.1)
    half = min(0.84 * canvas.half_width, 2.4) * rng.uniform(0.85, 1.0)
    tap = rng.uniform(-0.35, 0.35) * half
    space = new_space()
    add_walls(space, (-half, 12), (-half, FLOOR_M), (half, FLOOR_M), (half, 12))

    drops: list[pymunk.Body] = []
    seen, time_s = [], 0.0
    for step_s, is_frame in steps(canvas.times_s + already_s, 240):
        while len(drops) * row_every_s < abreast * min(time_s, open_s):
            for column in range(abreast):
                offset = 2.05 * radius * (column - (abreast - 1) / 2) + rng.uniform(-0.02, 0.02)
                drops.append(add_ball(space, (tap + offset, nozzle), radius))
                drops[-1].velocity = (0, -speed)
        space.step(step_s)
        time_s += step_s
        if is_frame:
            seen.append(np.array([(*drop.position, drop.velocity.y) for drop in drops]))
    states = np.full((len(seen), len(drops), 3), -99.0)  # drops still to come are far below the frame
    for frame, state in zip(states, seen, strict=True):
        frame[: len(state)] = state

    # A fast drop is drawn long and thin, as the piece of the jet that it stands for.
    stretch = np.maximum(-states[..., 2] / speed, 1.0)
    field = canvas.blobs(states[..., :2], 1.1 * radius, 1.1 * radius * stretch, stretch**-0.4)
    canvas.blend(np.clip(2.0 * (field - 0.92) + 0.5, 0, 1), colour, masked_above=0.5)
    canvas.tank(half, 6.0)
    canvas.paint(canvas.box(tap - 0.8, tap + 0.8, nozzle, 12), GREY)
    centre = np.array([state[:, :2].mean(0) for state in seen])
    return {"liquid": centre}, {
        "g_m_s2": GRAVITY_M_S2,
        "flow_m3_s": abreast * np.pi * radius**2 / 0.82 / row_every_s,
        "tank_width_m": 2 * half,
        "poured_before_s": already_s,
        "tap_open_s": open_s,
    }


@scene(
    Phenomenon.GAS_MOTION,
    "{colour} smoke rises from a chimney",
    "a chimney sends up {colour} smoke",
    "{colour} smoke drifts up from a chimney",
)
def smoke(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A buoyant plume (Morton, Taylor, Turner): it widens as b = (6/5) a z and rises as z ~ t^(3/4).

    Its speed is w = (5 / 6a) (9 a F / 10 pi)^(1/3) z^(-1/3), with entrainment a and buoyancy flux F.
    """
    entrainment, flux, mouth, wind = 0.1, rng.uniform(7, 13), rng.uniform(2.4, 3.2), rng.uniform(-0.12, 0.12)
    speed = 5 / (6 * entrainment) * (9 * entrainment * flux / (10 * np.pi)) ** (1 / 3)
    born_s = np.arange(-0.4, canvas.times_s[-1], 0.07)
    age_s = canvas.times_s[:, None] - born_s
    height = (4 / 3 * speed * np.maximum(age_s, 0)) ** 0.75
    width = 0.35 + 1.2 * entrainment * height
    swirl = 0.09 * height * np.sin(rng.uniform(0, 2 * np.pi) + 1.4 * height - 2.0 * canvas.times_s[:, None])
    puffs = np.stack([wind * height + swirl, mouth + height], -1)

    density = canvas.blobs(puffs, 0.8 * width, 0.8 * width, np.where(age_s > 0, 0.5 / width, 0.0))
    canvas.blend(1 - np.exp(-0.9 * density), colour, masked_above=0.35)
    canvas.floor()
    canvas.paint(canvas.box(-0.7, 0.7, FLOOR_M, mouth), mix(GREY, (150, 80, 60), 0.6))
    return {"smoke_front": puffs[:, 0]}, {
        "buoyancy_flux_m4_s3": flux,
        "entrainment": entrainment,
        "chimney_height_m": mouth,
        "oldest_puff_s": 0.4,
    }


@scene(
    Phenomenon.DEFORMATION,
    "a press flattens a {colour} block",
    "a {colour} block is squeezed flat by a press",
    "a press squeezes a {colour} block",
)
def press(canvas: Canvas, rng: np.random.Generator, colour: Colour) -> Outcome:
    """A press comes down at constant speed on a plastic block: height x width = const, and it stays flat."""
    width, height = rng.uniform(1.5, 1.9), rng.uniform(3.2, 4.0)
    speed, flat = rng.uniform(3.0, 4.0), height * rng.uniform(0.42, 0.5)
    start = FLOOR_M + height + rng.uniform(1.0, 2.0)
    way = speed * canvas.times_s
    turn = start - FLOOR_M - flat
    plate = start - np.minimum(way, turn) + 0.5 * np.maximum(way - turn, 0)
    pressed = FLOOR_M + np.minimum(height, start - FLOOR_M - np.minimum(way, turn))
    mean_half = width * height / (pressed - FLOOR_M) / 2
    up = 2 * canvas.share_up(FLOOR_M, pressed) - 1
    bulge = over_time(0.2 * (mean_half - width / 2))  # its mean over the height is zero: the volume stays
    side = np.abs(canvas.x) - over_time(mean_half) - bulge * (1 - 3 * up**2)

    canvas.floor()
    canvas.paint(np.maximum(side, canvas.box(-9, 9, FLOOR_M, pressed)), colour, masked=True)
    canvas.paint(canvas.box(-0.4, 0.4, plate, 11), mix(GREY, WHITE, 0.3))
    canvas.paint(canvas.box(-2.2, 2.2, plate, plate + 0.8), mix(GREY, WHITE, 0.5))
    return {"block_top": np.stack([np.zeros_like(pressed), pressed], 1)}, {
        "block_area_m2": width * height,
        "press_speed_m_s": speed,
    }


SCENES = (
    bouncing_ball,
    striking_ball,
    pendulum,
    rolling_wheel,
    block_on_spring,
    jelly,
    pouring_liquid,
    smoke,
    press,
)
