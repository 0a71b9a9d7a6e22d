"""Scenes of heat, gas and fire, each by one stated law."""

import numpy as np

from prophy.sandbox.drawing import DARK, FLOOR_M, GREY, ICE, WHITE, Canvas, Colour, mix, over_time
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import GRAVITY_M_S2, Outcome, gravity_m_s2, scene, slowness

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
    laws=(Law.TIME,),
)
def candle(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A candle of diameter D burns down at a constant speed; its flame puffs at 1.5 / sqrt(D) (fires)."""
    diameter, burn_speed = rng.uniform(1.6, 2.0), rng.uniform(0.4, 0.7) / slowness(canvas.times_s)
    height, flame = rng.uniform(3.6, 4.6), rng.uniform(2.8, 3.4)
    frequency, phase = 1.5 / np.sqrt(diameter), rng.uniform(0, 2 * np.pi)
    x = rng.uniform(-0.15, 0.15) * canvas.half_width
    puff = 2 * np.pi * frequency * canvas.times_s + phase
    wick = FLOOR_M + height - burn_speed * (canvas.times_s[::-1] if broken is Law.TIME else canvas.times_s)
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


@scene(
    Phenomenon.MELTING,
    "a {colour} ice block melts",
    "a {colour} ice block melts into a puddle",
    "{colour} ice melts on the floor",
    laws=(Law.TIME, Law.VOLUME),
)
def melting_block(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Heat comes in at a constant power P: the puddle gets the volume P t / (density x latent heat).

    The block keeps its shape; the puddle is half an ellipse, a third as high as wide, both a metre deep.
    """
    width, height = rng.uniform(2.2, 2.6), rng.uniform(2.8, 3.3)
    melting_s = rng.uniform(3.2, 4.2) * slowness(canvas.times_s)
    share = 1 - canvas.times_s / melting_s
    share = share[::-1] if broken is Law.TIME else share
    solid = width * height * np.maximum(share, 0)
    melted = width * height - solid
    scale = np.sqrt(solid / (width * height))
    puddle = np.sqrt(12 * melted / np.pi) * (0.0 if broken is Law.VOLUME else 1.0)
    x = rng.uniform(-0.1, 0.1) * canvas.half_width
    top = FLOOR_M + height * scale

    canvas.floor()
    lens = canvas.ellipse(x, FLOOR_M, puddle / 2 + 1e-3, puddle / 3 + 1e-3)
    canvas.paint(np.maximum(lens, FLOOR_M - canvas.y), mix(colour, DARK, 0.15), masked=True)
    left, right = x - width * scale / 2, x + width * scale / 2
    canvas.paint(canvas.box(left, right, FLOOR_M, top, 0.35 * scale), mix(colour, ICE, 0.25), masked=True)
    shine = canvas.box(
        left + 0.25 * scale, left + 0.55 * scale, FLOOR_M + 0.4 * (top - FLOOR_M), top - 0.3 * scale
    )
    canvas.paint(shine, mix(colour, ICE, 0.75))
    return {"block_top": np.stack([np.full_like(top, x), top], 1)}, {
        "block_volume_m3": width * height,
        "block_height_m": height,
        "melting_rate_m3_s": width * height / melting_s * (-1 if broken is Law.TIME else 1),
    }


@scene(
    Phenomenon.SOLIDIFICATION,
    "{colour} liquid freezes in a tank",
    "{colour} liquid freezes into ice",
    "a tank of {colour} liquid freezes",
    laws=(Law.TIME,),
)
def freezing_tank(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Cold from below: the ice grows as s = sqrt(2 k dT t / (density x latent heat)) = K sqrt(t) (Stefan)."""
    half = min(0.84 * canvas.half_width, 2.6) * rng.uniform(0.85, 1.0)
    level = FLOOR_M + rng.uniform(4.2, 5.6)
    growth = rng.uniform(2.0, 2.6) / np.sqrt(slowness(canvas.times_s))
    ice = FLOOR_M + growth * np.sqrt(canvas.times_s)
    ice = ice[::-1] if broken is Law.TIME else ice
    ripple = 0.15 * np.sin(2.2 * canvas.x + over_time(5.0 * canvas.times_s) + rng.uniform(0, 2 * np.pi))
    inside = canvas.box(-half, half, FLOOR_M, 10)
    liquid = np.maximum(inside, canvas.y - np.float32(level) - ripple)
    jag = 0.5 * np.abs((canvas.x * 0.9 + rng.uniform(0, 1)) % 1 - 0.5)
    frozen = np.maximum(liquid, canvas.y + jag - over_time(ice))
    cracks = np.abs((canvas.x * 0.8 + canvas.y * rng.uniform(0.3, 0.6)) % 1.1 - 0.55) - 0.1

    canvas.paint(liquid, colour)
    canvas.paint(frozen, mix(colour, ICE, 0.65), masked=True)
    canvas.paint(np.maximum(frozen, cracks), mix(colour, WHITE, 0.9))
    canvas.tank(half, level + 1.2)
    canvas.paint(canvas.box(-half - 0.3, half + 0.3, FLOOR_M - 0.7, FLOOR_M), mix(ICE, (90, 150, 220), 0.4))
    front = np.minimum(ice, level)
    return {"ice_front": np.stack([np.zeros_like(front), front], 1)}, {"ice_growth_m_per_sqrt_s": growth}


@scene(
    Phenomenon.VAPORIZATION,
    "{colour} liquid boils in a pot",
    "{colour} liquid boils and steams",
    "a pot of {colour} liquid boils away",
    laws=(Law.TIME, Law.BUOYANCY),
)
def boiling_pot(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A burner of power P: the level falls by P t / (density x latent heat x area).

    Bubbles of radius r rise at (2/3) sqrt(g r) (Davies and Taylor); the steam above spreads as it rises.
    """
    half = min(0.78 * canvas.half_width, 2.4) * rng.uniform(0.85, 1.0)
    slow = slowness(canvas.times_s)
    start, fall_speed, bottom = rng.uniform(4.4, 5.2), rng.uniform(0.5, 0.8) / slow, 1.8
    level = start - fall_speed * (canvas.times_s[::-1] if broken is Law.TIME else canvas.times_s)
    time = canvas.times_s[:, None]
    inside = canvas.box(-half, half, bottom, 10)
    boil = 0.12 * np.sin(3.1 * canvas.x + over_time(11 * canvas.times_s))
    surface = np.maximum(inside, canvas.y - over_time(level) - boil)

    steam_s = 0.07 * np.arange(-12, 30 if slow == 1 else np.ceil(canvas.times_s[-1] / 0.07))
    age_s = np.maximum(time - steam_s, 0)
    puffs = np.stack(
        [rng.uniform(-0.7, 0.7, len(steam_s)) * half * (1 + 0.3 * age_s), level[:, None] + 0.3 + 2.4 * age_s],
        -1,
    )
    puffs[..., 0] += 0.25 * np.sin(2 * puffs[..., 1] + steam_s * 9)
    amount = np.where(time > steam_s, np.exp(-1.1 * age_s), 0)
    steam = canvas.blobs(puffs, 0.4 + 0.25 * age_s, 0.5 + 0.25 * age_s, 0.4 * amount)
    canvas.blend(np.where(canvas.y > over_time(level), 1 - np.exp(-steam), 0), WHITE, masked_above=0.2)

    canvas.paint(surface, colour, masked=True)
    radius = rng.uniform(0.24, 0.42, 7)
    rise = 2 / 3 * np.sqrt(GRAVITY_M_S2 * radius)
    for x, r, speed, phase in zip(
        np.linspace(-0.8, 0.8, 7) * half, radius, rise, rng.uniform(0, 3, 7), strict=True
    ):
        way = speed * canvas.times_s * (-1 if broken is Law.BUOYANCY else 1)
        y = bottom + (phase + way) % (start - bottom)
        canvas.paint(np.maximum(canvas.disc(x, y, r), surface), mix(colour, WHITE, 0.6))
    pot = np.maximum(canvas.box(-half - 0.3, half + 0.3, bottom - 0.4, start + 0.9), -inside)
    canvas.paint(pot, GREY)
    for x in np.linspace(-0.7, 0.7, 4) * half:
        flicker = 0.75 + 0.15 * np.sin(9 * canvas.times_s + 5 * x)
        canvas.paint(canvas.ellipse(x, bottom - 0.45 - flicker / 2, 0.28, flicker / 2), FLAME[0])
    return {"surface": np.stack([np.zeros_like(level), level], 1)}, {
        "level_fall_m_s": fall_speed,
        "pot_width_m": 2 * half,
    }


@scene(
    Phenomenon.LIQUEFACTION,
    "{colour} vapor condenses into drops",
    "{colour} drops form on a cold plate",
    "{colour} vapor turns into falling drops",
    laws=(Law.GRAVITY,),
)
def condensing_vapor(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Vapor becomes liquid at a constant rate q per drop: r = (3 q t / 4 pi)^(1/3).

    A drop that reaches the critical radius lets go and falls by g; the next one starts to grow in its place.
    """
    count, plate = (3 if canvas.half_width < 3 else 5), 8.2
    half = 0.88 * canvas.half_width
    critical = rng.uniform(0.55, 0.7)
    growing_s, gravity = rng.uniform(0.9, 1.3), gravity_m_s2(broken)
    places = np.linspace(-0.68, 0.68, count) * half
    head_start = rng.permutation(np.linspace(0.15, 0.85, count)) * growing_s
    mist = np.stack([rng.uniform(-0.6, 0.6, 14) * half, rng.uniform(4.5, 7.6, 14)], 1)
    drift = 0.3 * np.sin(canvas.times_s[:, None, None] * 2 + rng.uniform(0, 6, (14, 2)))
    density = canvas.blobs(mist + drift, 0.8, 0.9, 0.16)
    slow = slowness(canvas.times_s)
    thinning = over_time(np.exp(-0.45 / slow * canvas.times_s))
    canvas.blend((1 - np.exp(-density)) * thinning, mix(colour, WHITE, 0.35))

    canvas.paint(canvas.box(-half, half, plate, plate + 0.7), ICE)
    canvas.paint(canvas.box(-half, half, plate + 0.7, plate + 1.2), mix(ICE, (90, 150, 220), 0.6))
    tracks = {}
    generations = 3 if slow == 1 else int(np.ceil(canvas.times_s[-1] / growing_s)) + 1
    for index, (x, already_s) in enumerate(zip(places, head_start, strict=True)):
        for generation in range(generations):
            age_s = canvas.times_s + already_s - generation * growing_s
            radius = critical * np.cbrt(np.clip(age_s / growing_s, 0, 1))
            y = plate - 0.8 * radius - 0.5 * gravity * np.maximum(age_s - growing_s, 0) ** 2
            canvas.paint(canvas.disc(x, y, radius), colour, opacity=age_s > 0, masked=True)
            if generation == 0:
                tracks[f"drop_{index}"] = np.stack([np.full_like(y, x), y], 1)
    return tracks, {
        "g_m_s2": gravity,
        "drop_critical_radius_m": critical,
        "condensation_m3_s": 4 / 3 * np.pi * critical**3 / growing_s,
        "cold_plate_height_m": plate,
    }


@scene(
    Phenomenon.EXPLOSION,
    "a {colour} bomb explodes",
    "a {colour} bomb blows up",
    "an exploding {colour} bomb",
    laws=(Law.GRAVITY,),
)
def bomb(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A point blast: the shock's radius is (E t^2 / density)^(1/5) (Sedov, Taylor); fragments fly by g."""
    radius, blast_s = rng.uniform(0.95, 1.2), rng.uniform(0.4, 0.8)
    x, y = rng.uniform(-0.1, 0.1) * canvas.half_width, rng.uniform(4.2, 6.0)
    centre = np.array([x, y])
    density, energy = 1.2, rng.uniform(60.0, 140.0)
    age_s = np.maximum(canvas.times_s - blast_s, 0)
    gone, there = age_s > 0, age_s == 0
    shock = (energy * age_s**2 / density) ** 0.2

    canvas.paint(np.abs(canvas.disc(x, y, shock)) - 0.2, WHITE, opacity=0.9 * np.exp(-0.6 * age_s) * gone)
    canvas.mask |= gone[:, None, None] & (canvas.disc(x, y, shock) < 0.2)
    heart = np.broadcast_to(centre, (len(age_s), 1, 2))
    for share, tint in zip((0.6, 0.45, 0.25), FLAME, strict=True):
        ball = canvas.blobs(heart, (share * shock + 0.1)[:, None], (share * shock + 0.1)[:, None])
        canvas.blend(np.clip(1.6 * ball, 0, 1) * over_time(np.exp(-1.2 * age_s) * gone), tint)
    count = 9
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 0.7, count)
    velocity = rng.uniform(3.0, 6.0, (count, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    drop = np.array([0, -0.5 * gravity_m_s2(broken)]) * age_s[:, None, None] ** 2
    pieces = centre + velocity * age_s[:, None, None] + drop
    for piece in pieces.swapaxes(0, 1):
        canvas.paint(canvas.disc(piece[:, 0], piece[:, 1], 0.38), colour, opacity=gone, masked=True)
    fuse = centre + np.array([0.5, radius + 0.7])
    canvas.paint(canvas.line((x, y), tuple(fuse), 0.25), GREY, opacity=there)
    spark = canvas.disc(fuse[0], fuse[1], 0.35 + 0.1 * np.sin(20 * canvas.times_s))
    canvas.paint(spark, FLAME[1], opacity=there)
    canvas.paint(canvas.disc(x, y, radius), colour, opacity=there, masked=True)
    return {
        "shock": centre + np.stack([shock, np.zeros_like(shock)], 1),
        "fragment": pieces[:, 0],
    }, {
        "g_m_s2": gravity_m_s2(broken),
        "blast_energy_j": energy,
        "air_density_kg_m3": density,
        "blast_time_s": blast_s,
    }


SCENES = (melting_block, freezing_tank, boiling_pot, condensing_vapor, candle, bomb)
