"""The 17 physical phenomena of WISA-80K, in three branches of physics, and their multi-hot vectors."""

import difflib
import functools
import re
from collections.abc import Iterable
from enum import StrEnum

import numpy as np

from prophy.errors import ProPhyError


class Phenomenon(StrEnum):
    """One labelled phenomenon. Its position in this list is its index in every vector and map."""

    COLLISION = "collision"
    RIGID_BODY_MOTION = "rigid body motion"
    ELASTIC_MOTION = "elastic motion"
    LIQUID_MOTION = "liquid motion"
    GAS_MOTION = "gas motion"
    DEFORMATION = "deformation"
    MELTING = "melting"
    SOLIDIFICATION = "solidification"
    VAPORIZATION = "vaporization"
    LIQUEFACTION = "liquefaction"
    COMBUSTION = "combustion"
    EXPLOSION = "explosion"
    REFLECTION = "reflection"
    REFRACTION = "refraction"
    SCATTERING = "scattering"
    INTERFERENCE_AND_DIFFRACTION = "interference and diffraction"
    UNNATURAL_LIGHT_SOURCE = "unnatural light source"

    @property
    def id(self) -> int:
        """Position in the taxonomy, 0 to 16."""
        return PHENOMENA.index(self)


PHENOMENA: tuple[Phenomenon, ...] = tuple(Phenomenon)
NUM_PHENOMENA = len(PHENOMENA)
BRANCHES: dict[str, tuple[Phenomenon, ...]] = {
    "dynamics": PHENOMENA[:6],
    "thermodynamics": PHENOMENA[6:12],
    "optics": PHENOMENA[12:],
}


def parse_phenomena(names: Iterable[str]) -> tuple[Phenomenon, ...]:
    """Turns names into phenomena, in taxonomy order and without repeats.

    Case, blanks and periods around a name do not matter, nor `_` or `-` for the blanks in it.

    Raises:
        ProPhyError: a name is not in the taxonomy; the message names the nearest one.
    """
    found = set()
    for name in names:
        try:
            found.add(Phenomenon(" ".join(re.split(r"[\s_-]+", name.strip(" \t\r\n.").lower()))))
        except ValueError:
            raise ProPhyError(f"unknown phenomenon {name!r}; did you mean {_nearest(name)!r}?") from None
    return tuple(phenomenon for phenomenon in PHENOMENA if phenomenon in found)


@functools.lru_cache(1000)  # a list of videos may have the same mistake in every row
def _nearest(name: str) -> str:
    return str(difflib.get_close_matches(name.lower(), PHENOMENA, n=1, cutoff=0.0)[0])


def multi_hot(phenomena: Iterable[Phenomenon]) -> np.ndarray:
    """Label vector `[NUM_PHENOMENA]`, float32: 1 where the phenomenon is present."""
    vector = np.zeros(NUM_PHENOMENA, np.float32)
    vector[[phenomenon.id for phenomenon in phenomena]] = 1.0
    return vector


def from_multi_hot(vector: Iterable[float]) -> tuple[Phenomenon, ...]:
    """The phenomena whose entry of a label vector `[NUM_PHENOMENA]` is above one half."""
    return tuple(phenomenon for phenomenon, value in zip(PHENOMENA, vector, strict=True) if value > 0.5)
