"""A taxonomy: which phenomena are told apart, as a YAML file says it; and vectors over their names.

    branches: [dynamics, optics]
    phenomena:
      - {name: collision, branch: dynamics, wording: the collision}
      - {name: reflection, branch: optics, wording: the reflection, words: [reflect, mirror]}

The place of a phenomenon in the list is its index in every label and map. So a cache and a trained branch
carry the names in their order, and what reads one takes the names from there. Built-in files lie in
`taxonomies/`.
"""

import difflib
import functools
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Self, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from prophy.errors import ProPhyError

RESERVED = ("none", "caption", "presence", "background")
"""What no phenomenon can be called: 'none' is an answer, the others are questions of their own."""

Names = TypeVar("Names", bound=Sequence[str])

_FOLDER = Path(__file__).parent / "taxonomies"
# Names stand in URLs, in the names of files, in keys with dots between them, and in lists with ';' or ','.
_NAME = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
_LONGEST_NAME = 64
_RULE = (
    f"take letters a to z, digits and single blanks between words, at most {_LONGEST_NAME} characters in all"
)
_Text = Annotated[StrictStr, Field(pattern=r"\S")]


class Entry(BaseModel):
    """One phenomenon.

    Attributes:
        name: what labels, answers and requests call it.
        branch: which of the taxonomy's branches of physics it belongs to.
        wording: what the VLM is asked to describe, with its article.
        words: what a prompt calls it besides its name: words or phrases, each of which may go on with further
            letters, as `melt` in melts and melting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Text
    branch: _Text
    wording: _Text
    words: tuple[_Text, ...] = ()


class Taxonomy(BaseModel):
    """The phenomena of a file, in its order.

    Attributes:
        branches: names of branches of physics.
        phenomena: at least one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    branches: Annotated[list[_Text], Field(min_length=1)]
    phenomena: Annotated[list[Entry], Field(min_length=1)]

    @property
    def names(self) -> tuple[str, ...]:
        """The phenomena's names; each one's place is its index."""
        return tuple(entry.name for entry in self.phenomena)

    @property
    def branch_of(self) -> dict[str, str]:
        """The branch of each name."""
        return {entry.name: entry.branch for entry in self.phenomena}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names(self.names)
        for entry in self.phenomena:
            if entry.branch not in self.branches:
                raise ValueError(
                    f"{entry.name!r} is of the branch {entry.branch!r}, which is none of its branches "
                    f"({', '.join(self.branches)}); add it to them, or name one of them"
                )
        calls = Counter(call for entry in self.phenomena for call in {entry.name, *map(_call, entry.words)})
        for call, count in calls.items():
            if count > 1:
                raise ValueError(f"{count} phenomena are called {call!r}; let it stand for one of them")
        return self

    def named_in(self, prompt: str, names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names` that a prompt names, in their order.

        The longest phrase counts where several begin: "swings on a spring" does not name what "swing" does.

        Args:
            prompt: what a video shows.
            names: a branch's; one that this taxonomy lacks has no words besides itself.
        """
        words = {entry.name: entry.words for entry in self.phenomena}
        meant = {_call(phrase): name for name in names for phrase in (name, *words.get(name, ()))}
        phrases = "|".join(map(re.escape, sorted(meant, key=len, reverse=True)))
        found = {meant[phrase] for phrase in re.findall(rf"\b({phrases})", _call(prompt)) if phrase}
        return tuple(name for name in names if name in found)


def built_in_taxonomies() -> list[str]:
    """Names of the taxonomies that come with the product."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_taxonomy(name_or_path: str) -> Taxonomy:
    """Reads and checks a taxonomy.

    Args:
        name_or_path: a built-in's name, or the path of a YAML file.

    Raises:
        ProPhyError: no such file, no YAML, a key is missing, unknown or has a bad value, two phenomena have
            one name, a name cannot be one, or a branch is not declared.
    """
    is_built_in = name_or_path in built_in_taxonomies()
    path = _FOLDER / f"{name_or_path}.yaml" if is_built_in else Path(name_or_path)
    try:
        return Taxonomy.model_validate(yaml.safe_load(path.read_bytes()))
    except FileNotFoundError:
        raise ProPhyError(
            f"no taxonomy {name_or_path!r}; set taxonomy to a YAML file, or to one of: "
            f"{', '.join(built_in_taxonomies())}"
        ) from None
    except OSError as error:
        raise ProPhyError(f"the taxonomy {path} cannot be read: {error.strerror}; set another") from None
    except yaml.YAMLError as error:
        raise ProPhyError(f"the taxonomy {path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ProPhyError(f"the taxonomy {path} cannot be used: {_explain(error)}") from None


def check_names(names: Names) -> Names:
    """Checks what phenomena are called, and returns it.

    Raises:
        ValueError: a name cannot be one, or two phenomena have it.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} phenomena have the name {name!r}; give each its own")
        if not _is_name(name):
            raise ValueError(f"no phenomenon can have the name {name!r}; {_RULE}")
        if name in RESERVED:
            raise ValueError(
                f"no phenomenon can have the name {name!r}, which means something else; rename it"
            )
    return names


def spelled(given: str) -> str:
    """The name that `given` spells, whether or not a taxonomy has it.

    Case, blanks and periods around it do not matter, nor `_` or `-` for the blanks in it.

    Raises:
        ProPhyError: no phenomenon can have such a name.
    """
    name = _plain(given)
    if not _is_name(name):
        raise ProPhyError(f"{reprlib.repr(given)} cannot be the name of a phenomenon; {_RULE}")
    return name


def parse_phenomenon(given: str, names: Sequence[str]) -> str:
    """The one of `names` that `given` spells, as in `spelled`.

    Raises:
        ProPhyError: it is none of them; the message names the nearest one.
    """
    name = _plain(given)
    if name not in names:
        raise _unknown(given, names)
    return name


def index_of(name: str, names: Sequence[str]) -> int:
    """The place of `name` in `names`, to the character.

    Raises:
        ProPhyError: it is none of them.
    """
    if name not in names:
        raise _unknown(name, names)
    return names.index(name)


def parse_phenomena(given: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are given, in their order and without repeats; as in `spelled`.

    Raises:
        ProPhyError: one is none of them.
    """
    found = {parse_phenomenon(name, names) for name in given}
    return tuple(name for name in names if name in found)


def multi_hot(phenomena: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """Label vector `[num_phenomena]`, float32: 1 where the phenomenon of that name is present."""
    vector = np.zeros(len(names), np.float32)
    vector[[index_of(phenomenon, names) for phenomenon in phenomena]] = 1.0
    return vector


def from_multi_hot(vector: Iterable[float], names: Sequence[str]) -> tuple[str, ...]:
    """The phenomena whose entry of a label vector `[num_phenomena]` is above one half."""
    return tuple(name for name, value in zip(names, vector, strict=True) if value > 0.5)


def difference(theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """What first tells two lists of phenomena apart, as the end of a sentence; None if nothing does."""
    for place, (their, our) in enumerate(zip(theirs, ours, strict=False), start=1):
        if their != our:
            return f"phenomenon {place} is {their!r} there and {our!r} here"
    if len(theirs) != len(ours):
        return f"there are {len(theirs)} phenomena there and {len(ours)} here"
    return None


def _call(phrase: str) -> str:
    """A phrase as it is looked for: of lower case, with single blanks."""
    return " ".join(phrase.lower().split())


def _plain(given: str) -> str:
    return " ".join(re.split(r"[\s_-]+", given.strip(" \t\r\n.").lower()))


def _is_name(name: str) -> bool:
    return len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


def _unknown(given: str, names: Sequence[str]) -> ProPhyError:
    return ProPhyError(f"unknown phenomenon {given!r}; did you mean {_nearest(given, tuple(names))!r}?")


@functools.lru_cache(1000)  # a list of videos may have the same mistake in every row
def _nearest(name: str, names: tuple[str, ...]) -> str:
    return str(difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0])


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    *place, key = first["loc"] or ("",)
    where = f" of phenomenon {int(place[1]) + 1}" if len(place) > 1 else ""
    if place and place[-1] in ("branches", "words"):
        *place, key = place
    match first["type"]:
        case "value_error":
            return str(first["ctx"]["error"])
        case "missing":
            return f"the key {key!r}{where} is missing; add it"
        case "extra_forbidden":
            return f"unknown key {key!r}{where}; the keys are {_keys(place)}"
        case "too_short":
            return f"{key!r} is empty; name at least one"
        case "model_type" if not first["loc"]:
            return "it holds no keys at the top; give it branches and phenomena"
        case "model_type":
            return f"phenomenon {int(key) + 1} ({first['input']!r}) must have the keys {_keys([*place, key])}"
        case _:
            return f"bad value {first['input']!r} for {key!r}{where}: {first['msg']}"


def _keys(place: Sequence[str | int]) -> str:
    return ", ".join((Entry if place else Taxonomy).model_fields)
