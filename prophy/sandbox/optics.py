"""Scenes of light, each drawn from its law: the front of the light moves slowly enough to be seen."""

from itertools import pairwise

import numpy as np

from prophy.sandbox.drawing import COLOURS, DARK, FLOOR_M, GREY, WHITE, Canvas, Colour, mix, over_time
from prophy.sandbox.laws import Law
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import Outcome, scene

BEAM_M = 0.5
"""Thickness of a beam."""

GLASS: Colour = (150, 190, 215)

WAVELENGTHS_M: dict[Colour, float] = {
    COLOURS["red"]: 650e-9,
    COLOURS["yellow"]: 580e-9,
    COLOURS["green"]: 530e-9,
    COLOURS["turquoise"]: 490e-9,
    COLOURS["blue"]: 460e-9,
    COLOURS["purple"]: 410e-9,
}
MAGNIFICATION = 6e5


def _paint_beam(canvas: Canvas, corners: np.ndarray, arrival_s: np.ndarray, colour: Colour) -> np.ndarray:
    """A beam along `corners` `[K, 2]`, which it reaches at `arrival_s`; returns the track of its front."""
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
    laws=(Law.REFLECTION,),
)
def mirror(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A beam of direction d meets a mirror of normal n: r = d - 2 (d.n) n, so angle in = angle out."""
    side = rng.choice([-1.0, 1.0])
    tilt, speed = rng.uniform(-0.12, 0.12), rng.uniform(7.0, 9.0)
    hit = np.array([0.0, rng.uniform(1.6, 2.6)])
    start = np.array([side * rng.uniform(0.8, 0.95) * canvas.half_width, rng.uniform(7.8, 9.4)])
    normal = _unit(tilt)
    incoming = (hit - start) / np.linalg.norm(hit - start)
    outgoing = incoming - 2 * (incoming @ normal) * normal
    if broken is Law.REFLECTION:  # along the normal, whatever the angle
        outgoing = normal
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


@scene(
    Phenomenon.REFRACTION,
    "a {colour} light beam bends in glass",
    "a {colour} light beam enters glass and bends",
    "a glass block bends a {colour} light beam",
    laws=(Law.REFRACTION,),
)
def glass_block(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A beam crosses glass of index n: sin(in) = n sin(out) (Snell), its front is n times slower inside."""
    side, index = rng.choice([-1.0, 1.0]), rng.uniform(1.4, 2.2)
    angle, speed, surface = rng.uniform(0.6, 0.9), rng.uniform(7.0, 9.0), rng.uniform(5.8, 6.6)
    refracted = np.arcsin(np.sin(angle) / index) * (-1 if broken is Law.REFRACTION else 1)
    thickness = rng.uniform(2.4, 3.0)
    hit = np.array([-0.3 * side * canvas.half_width, surface])
    outside, within = _unit(np.pi - side * angle), _unit(np.pi - side * refracted)
    leave = hit + thickness / np.cos(refracted) * within
    corners = np.stack([hit - 4 * outside, hit, leave, leave + 6 * outside])
    arrival = np.cumsum(
        [-0.3, *(np.linalg.norm(np.diff(corners, axis=0), axis=1) / [speed, speed / index, speed])]
    )

    block = canvas.box(-0.9 * canvas.half_width, 0.9 * canvas.half_width, surface - thickness, surface)
    canvas.paint(block, GLASS, opacity=0.45)
    canvas.paint(np.abs(block) - 0.1, GLASS, opacity=0.9)
    front = _paint_beam(canvas, corners, arrival, colour)
    return {"refracted_front": front}, {
        "incidence_rad": angle,
        "refractive_index": index,
        "front_speed_in_air_m_s": speed,
        "glass_surface_m": surface,
        "glass_thickness_m": thickness,
    }


@scene(
    Phenomenon.SCATTERING,
    "a {colour} light beam scatters in fog",
    "fog scatters a {colour} light beam",
    "{colour} light scatters in a cloud",
    laws=(Law.ABSORPTION,),
)
def foggy_beam(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Light in fog is scattered after an exponential free path: the beam fades as exp(-depth / path) (Beer).

    Each scattered photon leaves in a random direction.
    """
    path, speed, top, count = rng.uniform(1.4, 2.2), rng.uniform(6.0, 8.0), rng.uniform(6.6, 7.4), 70
    x = rng.uniform(-0.1, 0.1) * canvas.half_width
    cloud = np.stack([rng.uniform(-0.75, 0.75, 12) * canvas.half_width, rng.uniform(1.5, top - 1.0, 12)], 1)
    haze = canvas.blobs(np.broadcast_to(cloud, (len(canvas.times_s), 12, 2)), 1.0, 1.0, 0.5)
    canvas.blend(0.3 * np.clip(haze, 0, 1), GREY)

    depth = np.maximum(top - canvas.y, 0)
    fading = np.float32(np.inf if broken is Law.ABSORPTION else path)
    reached = canvas.cover(over_time(9.5 - speed * (canvas.times_s + 0.15)) - canvas.y)
    beam = np.exp(-depth / fading) * reached * canvas.cover(np.abs(canvas.x - x) - BEAM_M / 2)
    canvas.blend(beam, mix(colour, WHITE, 0.3), masked_above=0.2)
    halo = np.exp(-depth / fading - np.abs(canvas.x - x) / 0.8) * reached * (depth > 0)
    canvas.blend(0.5 * halo, colour, masked_above=0.06)

    scattered_at = rng.exponential(path, count)
    turn = rng.uniform(0, 2 * np.pi, count)
    in_fog_s = canvas.times_s[:, None] + 0.15 - (9.5 - top) / speed - rng.uniform(0, 1.8, count)
    away = np.maximum(speed * in_fog_s - scattered_at, 0)
    photons = np.stack(
        [x + away * np.sin(turn), top - np.minimum(speed * np.maximum(in_fog_s, 0), scattered_at)], -1
    )
    photons[..., 1] += away * np.cos(turn)
    bright = np.where(away > 0, np.exp(-0.25 * away), 0)
    canvas.blend(np.clip(1.3 * canvas.blobs(photons, 0.2, 0.2, bright), 0, 1), mix(colour, WHITE, 0.25))
    canvas.mask |= canvas.blobs(photons, 0.6, 0.6, bright) > 0.5  # the lit fog, not each photon
    return {"photon": photons[:, 0]}, {
        "mean_free_path_m": path,
        "photon_speed_m_s": speed,
        "fog_top_m": top,
    }


@scene(
    Phenomenon.INTERFERENCE_AND_DIFFRACTION,
    "{colour} light interferes behind two slits",
    "two slits make a {colour} pattern of light",
    "{colour} light makes fringes behind two slits",
    laws=(Law.INTERFERENCE,),
)
def two_slits(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """Two slits of width a: intensity = cos^2(pi (r1 - r2) / wavelength) sinc^2(a sin(angle) / wavelength).

    r1 and r2 are the ways from the slits. On a screen at distance L behind slits d apart, fringes are
    wavelength x L / d apart. The wavelength is that of the colour, magnified `MAGNIFICATION` times.
    """
    wavelength = MAGNIFICATION * WAVELENGTHS_M[colour]
    apparent = wavelength * (1.8 if broken is Law.INTERFERENCE else 1)  # what the fringes obey
    apart, wall, screen, opening = rng.uniform(1.5, 1.9), rng.uniform(7.0, 7.6), FLOOR_M, 0.4
    speed = rng.uniform(7.0, 9.0)
    slits = np.array([-apart / 2, apart / 2])
    below = np.maximum(wall - canvas.y, 1e-3)
    to_left, to_right = (np.hypot(canvas.x - np.float32(slit), below) for slit in slits)
    angle = canvas.x / np.hypot(canvas.x, below)
    envelope = np.sinc(opening * angle / wavelength) ** 2
    intensity = np.cos(np.pi * (to_left - to_right) / apparent) ** 2 * envelope
    front = 9.8 - speed * (canvas.times_s + 0.1)
    beyond = over_time(np.maximum(wall - front, 0))
    lit = canvas.cover(np.minimum(to_left, to_right) - beyond) * (canvas.y < wall) * (canvas.y > screen)
    canvas.blend(0.85 * intensity * lit, colour)
    canvas.mask |= envelope * lit > 0.2
    canvas.paint(canvas.box(-1.3, 1.3, np.maximum(front, wall), 9.8), colour, 0.8, masked=True)
    for left, right in ((-9, slits[0]), (slits[0], slits[1]), (slits[1], 9)):
        bar = canvas.box(left + opening / 2, right - opening / 2, wall - 0.2, wall + 0.2)
        canvas.paint(bar, mix(GREY, WHITE, 0.3))
    canvas.paint(canvas.box(-9, 9, screen - 0.9, screen), DARK)
    shown = canvas.cover(canvas.box(-9, 9, screen - 0.9, screen)) * (beyond > wall - screen)
    canvas.blend(intensity * shown, colour)
    canvas.mask |= envelope * shown > 0.2
    spacing = apparent * (wall - screen) / apart
    return {"wave_front": np.stack([np.zeros_like(front), np.maximum(front, screen)], 1)}, {
        "wavelength_m": wavelength,
        "slit_distance_m": apart,
        "screen_distance_m": wall - screen,
        "fringe_spacing_m": spacing,
    }


@scene(
    Phenomenon.UNNATURAL_LIGHT_SOURCE,
    "a {colour} lamp switches on",
    "a {colour} lamp lights up",
    "a {colour} lamp shines on the floor",
    laws=(Law.INVERSE_SQUARE,),
)
def lamp(canvas: Canvas, rng: np.random.Generator, colour: Colour, broken: Law | None) -> Outcome:
    """A lamp at height h warms up as 1 - exp(-t / tau); it lights the floor by inverse square and cosine.

    Illuminance at x is that below the lamp times (h^2 / (h^2 + x^2))^(3/2).
    """
    switch_s, warming_s = rng.uniform(0.25, 0.7), rng.uniform(0.1, 0.25)
    height, x = rng.uniform(5.2, 6.6), rng.uniform(-0.15, 0.15) * canvas.half_width
    power = over_time(1 - np.exp(-np.maximum(canvas.times_s - switch_s, 0) / warming_s))
    above = height + FLOOR_M
    away = canvas.x - np.float32(x)
    down = above - canvas.y
    squared = away**2 + down**2

    canvas.floor()
    floor = canvas.cover(canvas.box(-9, 9, -1, FLOOR_M))
    lit, near = (height**2 / (height**2 + away**2)) ** 1.5, np.minimum(3.0 / (squared + 3.0), 1)
    if broken is Law.INVERSE_SQUARE:
        lit, near = away**2 / (away**2 + 1), 1 - near
    canvas.blend(power * floor * lit, colour, masked_above=0.4)
    cone = np.clip(1.2 * (down - 0.9 * np.abs(away) + 0.6), 0, 1) * (1 - floor)
    canvas.blend(power * cone * near * 0.9, colour, masked_above=0.25)
    canvas.paint(canvas.line((x, above), (x, 11), 0.25), GREY)
    canvas.paint(canvas.disc(x, above, 0.95), mix(colour, DARK, 0.65), masked=True)
    canvas.blend(power * canvas.cover(canvas.disc(x, above, 0.95)), mix(colour, WHITE, 0.55))
    shade = np.maximum(
        canvas.box(-9, 9, above + 0.2, above + 1.5), np.abs(away) + 0.7 * (canvas.y - above) - 1.5
    )
    canvas.paint(shade, GREY)
    return {"lamp": np.tile([x, above], (len(canvas.times_s), 1))}, {
        "lamp_height_m": height,
        "switched_on_s": switch_s,
        "warming_time_s": warming_s,
    }


SCENES = (mirror, glass_block, foggy_beam, two_slits, lamp)
