"""Which combinations are held out: never in a clip of the train split, at least one in each held-out clip.

This file is the only one that names them. Each colour of a held-out triple is seen with the same phenomenon
on another side, and each phenomenon of a held-out pair with others: the combination is what is tested.
"""

from typing import Literal, TypeAlias

from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import Part

Split: TypeAlias = Literal["train", "held_out"]

HELD_OUT_TRIPLES: dict[Phenomenon, frozenset[tuple[str, str]]] = {
    Phenomenon.COLLISION: frozenset({("blue", "left"), ("red", "right")}),
    Phenomenon.RIGID_BODY_MOTION: frozenset({("yellow", "left"), ("purple", "right")}),
    Phenomenon.ELASTIC_MOTION: frozenset({("red", "left"), ("green", "right")}),
    Phenomenon.LIQUID_MOTION: frozenset({("green", "left"), ("turquoise", "right")}),
    Phenomenon.GAS_MOTION: frozenset({("purple", "left"), ("yellow", "right")}),
    Phenomenon.DEFORMATION: frozenset({("turquoise", "left"), ("blue", "right")}),
    Phenomenon.MELTING: frozenset({("purple", "left"), ("turquoise", "right")}),
    Phenomenon.SOLIDIFICATION: frozenset({("green", "left"), ("red", "right")}),
    Phenomenon.VAPORIZATION: frozenset({("blue", "left"), ("yellow", "right")}),
    Phenomenon.LIQUEFACTION: frozenset({("purple", "left"), ("green", "right")}),
    Phenomenon.COMBUSTION: frozenset({("turquoise", "left"), ("purple", "right")}),
    Phenomenon.EXPLOSION: frozenset({("green", "left"), ("blue", "right")}),
    Phenomenon.REFLECTION: frozenset({("yellow", "left"), ("red", "right")}),
    Phenomenon.REFRACTION: frozenset({("turquoise", "left"), ("green", "right")}),
    Phenomenon.SCATTERING: frozenset({("blue", "left"), ("yellow", "right")}),
    Phenomenon.INTERFERENCE_AND_DIFFRACTION: frozenset({("red", "left"), ("purple", "right")}),
    Phenomenon.UNNATURAL_LIGHT_SOURCE: frozenset({("yellow", "left"), ("blue", "right")}),
}
"""Per phenomenon the held-out (colour, side)."""

HELD_OUT_PAIRS: frozenset[frozenset[Phenomenon]] = frozenset(
    map(
        frozenset,
        (
            (Phenomenon.COLLISION, Phenomenon.REFLECTION),
            (Phenomenon.LIQUID_MOTION, Phenomenon.COMBUSTION),
            (Phenomenon.RIGID_BODY_MOTION, Phenomenon.MELTING),
            (Phenomenon.ELASTIC_MOTION, Phenomenon.SCATTERING),
            (Phenomenon.GAS_MOTION, Phenomenon.REFRACTION),
            (Phenomenon.DEFORMATION, Phenomenon.INTERFERENCE_AND_DIFFRACTION),
            (Phenomenon.SOLIDIFICATION, Phenomenon.EXPLOSION),
            (Phenomenon.VAPORIZATION, Phenomenon.UNNATURAL_LIGHT_SOURCE),
            (Phenomenon.LIQUEFACTION, Phenomenon.COLLISION),
        ),
    )
)
"""Phenomena that are never together in a training clip."""


def split_of(parts: tuple[Part, ...]) -> Split:
    """`held_out` where the parts hold a held-out triple or pair, else `train`."""
    triple = any((part.colour, part.side) in HELD_OUT_TRIPLES[part.phenomenon] for part in parts)
    return "held_out" if triple or frozenset(part.phenomenon for part in parts) in HELD_OUT_PAIRS else "train"
