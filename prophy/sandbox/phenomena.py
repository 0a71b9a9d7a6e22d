"""What the scenes show, by the names of the built-in taxonomy `wisa`."""

from collections.abc import Sequence
from enum import StrEnum

from prophy.errors import ProPhyError


class Phenomenon(StrEnum):
    """The label of a scene. Simulated clips are drawn in this order."""

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


PHENOMENA: tuple[Phenomenon, ...] = tuple(Phenomenon)


def check_taxonomy(names: Sequence[str]) -> None:
    """Checks that phenomena of these names can label simulated clips.

    Raises:
        ProPhyError: one that is simulated is not among them.
    """
    missing = [str(phenomenon) for phenomenon in PHENOMENA if phenomenon not in names]
    if missing:
        raise ProPhyError(
            f"simulated clips show {', '.join(missing)}, which the taxonomy does not name; set taxonomy to "
            "one that does, such as wisa, or use videos of your own"
        )
