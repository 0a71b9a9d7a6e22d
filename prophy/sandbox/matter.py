"""Scenes of what has no shape of its own: liquid, gas, and a block under a press."""

import numpy as np
import pymunk

from prophy.sandbox.drawing import FLOOR_M, GREY, WHITE, Canvas, Colour, mix, over_time
from prophy.sandbox.engine import add_ball, add_walls, new_space, steps
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import GRAVITY_M_S2, Outcome, scene


@scene(
    Phenomenon.LIQUID_MOTION,
    "{colour} liquid pours into a tank",
    "{colour} liquid flows from a tap",
    "a tap fills a tank with {colour} liquid",
    laws=(Law.VOLUME,),
)
def pouring_liquid(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
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
    if broken is Law.VOLUME:  # what has been out for a while is gone
        out_s = (canvas.times_s + already_s)[:, None] - np.arange(len(drops)) * row_every_s / abreast
        states[out_s > 0.9] = -99.0

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
    laws=(Law.TIME,),
)
def smoke(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A buoyant plume (Morton, Taylor, Turner): it widens as b = (6/5) a z and rises as z ~ t^(3/4).

    Its speed is w = (5 / 6a) (9 a F / 10 pi)^(1/3) z^(-1/3), with entrainment a and buoyancy flux F.
    """
    entrainment, flux, mouth, wind = 0.1, rng.uniform(7, 13), rng.uniform(2.4, 3.2), rng.uniform(-0.12, 0.12)
    speed = 5 / (6 * entrainment) * (9 * entrainment * flux / (10 * np.pi)) ** (1 / 3)
    born_s = np.arange(-0.4, canvas.times_s[-1], 0.07)
    time = canvas.times_s[::-1] if broken is Law.TIME else canvas.times_s
    age_s = time[:, None] - born_s
    height = (4 / 3 * speed * np.maximum(age_s, 0)) ** 0.75
    width = 0.35 + 1.2 * entrainment * height
    swirl = 0.09 * height * np.sin(rng.uniform(0, 2 * np.pi) + 1.4 * height - 2.0 * time[:, None])
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
    laws=(Law.VOLUME,),
)
def press(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A press comes down at constant speed on a plastic block: height x width = const, and it stays flat."""
    width, height = rng.uniform(1.5, 1.9), rng.uniform(3.2, 4.0)
    speed, flat = rng.uniform(3.0, 4.0), height * rng.uniform(0.42, 0.5)
    start = FLOOR_M + height + rng.uniform(1.0, 2.0)
    way = speed * canvas.times_s
    turn = start - FLOOR_M - flat
    plate = start - np.minimum(way, turn) + 0.5 * np.maximum(way - turn, 0)
    pressed = FLOOR_M + np.minimum(height, start - FLOOR_M - np.minimum(way, turn))
    mean_half = width * height / (pressed - FLOOR_M) / 2
    if broken is Law.VOLUME:
        mean_half = np.full_like(pressed, width / 2)
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


SCENES = (pouring_liquid, smoke, press)
