"""What all sections of a configuration share: the strict model and the types of its values."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from prophy.errors import ProPhyError
from prophy.taxonomy import built_in_taxonomies, load_taxonomy
from prophy.tiny import EMBEDDED, bundled

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class How:
    """Marks a key that says how to run, not what is made: its value may change within one run folder."""


def is_url(location: str) -> bool:
    """Whether it names a scheme, such as s3:// or gs://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def _absolute_path(path: Path) -> Path:
    """Shells leave `~` alone after `key=`, so it is expanded here."""
    return Path.home().joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path.absolute()


def _check_not_empty(location: object) -> None:
    """Python would take an empty path, such as a variable of the shell that is not set, for this folder."""
    if not str(location).strip():
        raise ValueError("this is empty; set it to a place, or to . for this folder")


def _absolute(location: str) -> str:
    _check_not_empty(location)
    return location if "://" in location else str(_absolute_path(Path(location)))


def _no_url(location: object) -> object:
    """Python would take `s3://bucket` for the path of a local folder `s3:`."""
    if is_url(str(location)):
        raise ValueError("this cannot be a URL; set it to a folder, which all nodes of a cluster must see")
    _check_not_empty(location)
    return location


def folder_or_s3(location: str) -> str:
    """A folder or a place in S3, in full.

    Raises:
        ValueError: it is empty, or a URL of something else than S3.
    """
    _check_not_empty(location)
    if "://" not in location:
        return str(_absolute_path(Path(location)))
    if re.match(r"s3://[^/]", location) is None:
        raise ValueError(
            "set this to a folder, or to a place in S3 such as s3://bucket/folder, but to no other URL"
        )
    return location.rstrip("/")


def _pretrained(name: str) -> str:
    is_place = not name.strip() or "://" in name or (name != EMBEDDED and Path(name).is_dir())
    return folder_or_s3(name) if is_place else name


def _branch(name: str) -> str:
    return str(bundled("branch")) if name == EMBEDDED else folder_or_s3(name)


def _taxonomy(name: str) -> str:
    location = name if name in built_in_taxonomies() else _absolute(name)
    try:
        load_taxonomy(location)
    except ProPhyError as error:
        raise ValueError(str(error)) from None
    return location


# Workers run in folders of their own: what is relative on the command line must not stay so.
LocalPath = Annotated[Path, BeforeValidator(_no_url), AfterValidator(_absolute_path)]
Location = Annotated[str, AfterValidator(_absolute)]
FolderOrS3 = Annotated[str, AfterValidator(folder_or_s3)]
Pretrained = Annotated[str, AfterValidator(_pretrained)]
BranchFolder = Annotated[str, AfterValidator(_branch)]
TaxonomyName = Annotated[str, AfterValidator(_taxonomy)]


class Section(BaseModel):
    """Base of every part: frozen, a key that it does not know is an error, and every key is described.

    No number is infinite: what has no bound is null.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_is_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Python would take `yes` for 1."""
        kinds = [*_kinds(cls.model_fields[info.field_name or ""].annotation)]
        is_number = any(kind in (int, float) or type(kind) is int for kind in kinds)
        if is_number and bool not in kinds and _holds_bool(value):
            raise ValueError("give a number; YAML reads yes, no, on, off, true and false as none")
        return value


def _holds_bool(value: object) -> bool:
    if isinstance(value, dict):
        return _holds_bool([*value.values()])
    return any(map(_holds_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _kinds(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, types among it."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def how_keys(section: type[Section]) -> set[str]:
    """The keys of a section that are marked `How`."""
    fields = section.model_fields.items()
    return {name for name, field in fields if any(isinstance(mark, How) for mark in field.metadata)}


class PoolConfig(Section):
    """A pool of Ray actors."""

    size: PositiveInt = 1
    """Number of actors, at least one. Each actor that uses a model loads its own copy."""

    num_cpus: NonNegativeFloat = 1.0
    """CPUs that Ray reserves for each actor. An actor computes with as many threads as it has CPUs."""

    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for each actor; 0.5 lets two actors share one, 0 (the default) is the CPU."""
