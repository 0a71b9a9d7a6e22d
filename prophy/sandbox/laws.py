"""The laws that scenes obey, and what becomes of each in a clip that breaks it."""

from enum import StrEnum


class Law(StrEnum):
    """A law that a clip can break, everything else being equal."""

    GRAVITY = "gravity"
    RESTITUTION = "restitution"
    MOMENTUM = "momentum"
    ROLLING = "rolling"
    ENERGY = "energy"
    VOLUME = "volume"
    BUOYANCY = "buoyancy"
    TIME = "arrow of time"
    REFLECTION = "reflection"
    REFRACTION = "refraction"
    ABSORPTION = "absorption"
    INTERFERENCE = "interference"
    INVERSE_SQUARE = "inverse square"
    PERMANENCE = "permanence"
    ONENESS = "oneness"


WHEN_BROKEN: dict[Law, str] = {
    Law.GRAVITY: "falls with 0.4 g",
    Law.RESTITUTION: "a bounce gives more speed than came in",
    Law.MOMENTUM: "two balls that meet go back together, as if pushed",
    Law.ROLLING: "a wheel turns against its way",
    Law.ENERGY: "a swing widens by itself",
    Law.VOLUME: "matter gets less, or goes nowhere",
    Law.BUOYANCY: "bubbles sink",
    Law.TIME: "ice, a candle, smoke or a boiling liquid becomes again what it was",
    Law.REFLECTION: "a beam leaves a mirror at another angle than it came",
    Law.REFRACTION: "a beam bends to the wrong side of the normal",
    Law.ABSORPTION: "a beam crosses fog and gets no weaker",
    Law.INTERFERENCE: "fringes are 1.8 times as far apart",
    Law.INVERSE_SQUARE: "a lamp lights best what is farthest",
    Law.PERMANENCE: "a ball vanishes",
    Law.ONENESS: "a ball becomes two",
}
"""What a clip shows that breaks the law."""
