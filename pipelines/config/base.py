"""What all sections of a configuration share: the strict model and the types of its values."""

from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
)

from prophy.tiny import bundled

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _absolute_path(path: Path) -> Path:
    """Shells leave `~` alone after `key=`, so it is expanded here."""
    return Path.home().joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path.absolute()


def _absolute(location: str) -> str:
    return location if "://" in location else str(_absolute_path(Path(location)))


def _absolute_folder(name: str) -> str:
    return _absolute(name) if name != "tiny" and Path(name).is_dir() else name


# Workers run in folders of their own: what is relative on the command line must not stay so.
def _checkpoint(name: object) -> object:
    return bundled("branch") if name == "tiny" else name


LocalPath = Annotated[Path, AfterValidator(_absolute_path)]
Location = Annotated[str, AfterValidator(_absolute)]
Pretrained = Annotated[str, AfterValidator(_absolute_folder)]
Checkpoint = Annotated[Path, BeforeValidator(_checkpoint), AfterValidator(_absolute_path)]


class Section(BaseModel):
    """Base of every part: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolConfig(Section):
    """One pool of Ray actors: how many, and what each reserves."""

    size: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
