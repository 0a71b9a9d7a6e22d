"""Reads a configuration: a preset or any YAML file, with what it extends, and overrides; checks all of it."""

import difflib
import os
import re
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipelines.config.run import WRITES, Config
from pipelines.layout import RunFolder
from prophy.errors import ProPhyError

PRESETS = Path(str(resources.files("pipelines.config"))) / "presets"

_COMMAND_LINE = "the command line"
# What presets have in common; no run of its own.
_PARTS = ("base",)
# What stands there by mistake may be a key itself, and messages go to the logs of jobs.
_SECRET = ("serve", "api_keys")
RESOLVED = "# All values of a run, written by its command: what is changed here is lost.\n"
"""How the file begins that a command writes into its run folder."""

# As YAML writes it.
_NULLS = ("~", "null")


def preset_names() -> list[str]:
    """Names of the configurations that come with the product."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml") if file.stem not in _PARTS)


def load_config(name_or_path: str, overrides: list[str] | None = None, command: str | None = None) -> Config:
    """Reads, overrides, resolves and checks a configuration.

    A file that says `extends: NAME` starts from a preset, or from another file (relative to its own folder),
    and says only what differs.

    Args:
        name_or_path: a preset's name, or the path of a YAML file.
        overrides: `section.key=value` each. The value of a key that takes a text or a path is that text, to
            the character; any other is read as YAML.
        command: the command that wants it, whose sections must be there.

    Raises:
        ProPhyError: no such file, not YAML, it extends itself, an unknown key (names the nearest one and the
            file it stands in), a bad value, a section that the command needs is missing, or the command would
            overwrite a file that was read.
    """
    layers = _read(_find(name_or_path))
    path = next(iter(layers))
    if overrides:
        layers = {_COMMAND_LINE: _parse(overrides)} | layers
    _check_given(layers)
    try:
        values = OmegaConf.to_container(OmegaConf.merge(*reversed(layers.values())), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise _invalid(_name(layers), error) from None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ProPhyError(_explain(error, layers)) from None
    if command is not None and (missing := config.lacking(command)):
        sections = "the section" if len(missing) == 1 else "the sections"
        raise ProPhyError(
            f"`prophy {command}` needs {sections} {', '.join(missing)}, which {path} does not have; add what "
            "is missing, or let the file extend a preset, such as with `extends: tiny`"
        )
    _check_kept([Path(name) for name in layers if name != _COMMAND_LINE], config, command)
    return config


def read_saved(saved: Path, command: str, sections: Iterable[str]) -> dict[str, Any]:
    """The configuration that a command wrote into its run folder.

    Args:
        saved: the file.
        command: which wrote it.
        sections: what it must hold.

    Raises:
        ProPhyError: it is something else, or cannot be read.
    """
    values: Any = None
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError):
        values = OmegaConf.to_container(OmegaConf.load(saved), resolve=True)
    if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in sections):
        raise ProPhyError(
            f"{saved} is not what `prophy {command}` writes there, the configuration of the run; remove it "
            "or give it another name, or choose another run_dir"
        )
    return values


def _check_given(layers: dict[str, DictConfig]) -> None:
    """OmegaConf would pass over `???`, its mark of what is to be given, where another layer has a value."""
    above = list[Any]()
    for name, tree in layers.items():
        values = OmegaConf.to_container(tree)
        for location in _missing(values):
            if not any(_holds(given, location) for given in above):
                key = ".".join(map(str, location))
                raise ProPhyError(
                    f"{key} is ??? {_where(name)}, which stands for a value that is to be given; give it one"
                )
        above.append(values)


def _missing(values: Any) -> Iterator[tuple[int | str, ...]]:
    """Where in a tree, references in which may lead out of it, a value is to be given."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        for key, inner in values.items():
            yield from ((key, *location) for location in _missing(inner))
    elif values == "???":
        yield ()


def _check_kept(files: list[Path], config: Config, command: str | None) -> None:
    for name in WRITES.get(command or "", ()):
        written = RunFolder(config.run_dir).config(name)
        read = any(os.path.exists(written) and file.samefile(written) for file in files)
        if read and not written.read_text("utf-8").startswith(RESOLVED):
            raise ProPhyError(
                f"`prophy {command}` would overwrite {written}, which was read, with all values that it runs "
                "with; give that file another name, or choose another run_dir"
            )


def _parse(overrides: list[str]) -> DictConfig:
    given, key = OmegaConf.create(), ""
    try:
        for override in overrides:
            key, sign, text = override.partition("=")
            if not sign:
                raise ProPhyError(f"{override!r} sets nothing; write KEY=VALUE, such as run_dir=runs/mine")
            is_text, may_be_null = _takes_text(key)
            if is_text and may_be_null and not text.strip():
                raise ProPhyError(f"{key} is empty on {_COMMAND_LINE}; give it a value, or write {key}=null")
            if is_text and not (may_be_null and text in _NULLS):
                OmegaConf.update(given, key, text)
            else:
                _check_numbers(text)
                given.merge_with_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        if key == ".".join(_SECRET):
            raise ProPhyError(f"{key} on {_COMMAND_LINE} is no list; write {key}=[HASH]") from None
        raise _invalid(f"what {_COMMAND_LINE} sets", error) from None
    return given


def _read(path: Path, after: tuple[Path, ...] = ()) -> dict[str, DictConfig]:
    """What `path` holds, then what the file holds that it extends, and so on; by the files' paths."""
    if path in after:
        circle = ", which extends ".join(map(str, [*after[after.index(path) :], path]))
        raise ProPhyError(f"{circle}; no file may extend itself")
    try:
        tree = OmegaConf.load(path)
        _check_numbers(path.read_text("utf-8"))
        if not isinstance(tree, DictConfig):
            raise TypeError("it holds no keys at the top")
        base = tree.pop("extends", None)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        raise _invalid(str(path), error) from None
    if base is None:
        return {str(path): tree}
    if not isinstance(base, str):
        raise ProPhyError(f"{path} extends {base!r}; give the name of a preset, or the path of a YAML file")
    return {str(path): tree} | _read(_find(base, path), (*after, path))


def _check_numbers(text: str) -> None:
    plain = (event for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent) and event.implicit[0])
    for event in plain:
        if re.fullmatch(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)", event.value):
            base = 60 if ":" in event.value else 8
            raise ValueError(
                f"YAML reads {event.value} as a number of base {base}; write it in base 10, without a 0 "
                "before it, or in quotes if it is a text"
            )


def _takes_text(key: str) -> tuple[bool, bool]:
    """Whether the value of a dotted key is a text or a path, and whether it may be null."""
    annotation: Any = Config
    for part in key.split("."):
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = None if field is None else field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    kinds = {get_args(member)[0] if get_origin(member) is Annotated else member for member in members}
    return bool(kinds & {str, Path}), types.NoneType in kinds


def _find(name_or_path: str, extended_by: Path | None = None) -> Path:
    if name_or_path in [*preset_names(), *(_PARTS if extended_by else ())]:
        return PRESETS / f"{name_or_path}.yaml"
    path = (extended_by.parent if extended_by else Path()) / name_or_path
    if not path.is_file():
        wanted = f"no configuration {name_or_path!r}"
        if extended_by:
            wanted = f"{extended_by} extends {name_or_path!r}, which does not exist"
        raise ProPhyError(f"{wanted}; give a YAML file or one of: {', '.join(preset_names())}")
    return path.resolve() if extended_by else path


def _invalid(name: str, error: Exception) -> ProPhyError:
    return ProPhyError(f"{name} is not a valid configuration: {' '.join(str(error).split())}")


def _name(layers: dict[str, DictConfig]) -> str:
    """All files that a configuration was made of, in words."""
    files = " extending ".join(name for name in layers if name != _COMMAND_LINE)
    return f"{files} with what {_COMMAND_LINE} adds" if _COMMAND_LINE in layers else files


def _where(layer: str) -> str:
    return f"on {layer}" if layer == _COMMAND_LINE else f"in {layer}"


def _explain(error: ValidationError, layers: dict[str, DictConfig]) -> str:
    """One sentence about the first thing that is wrong, and where it stands."""
    first = error.errors()[0]
    location = first["loc"]
    key, message = ".".join(str(part) for part in location), first["msg"].removeprefix("Value error, ")
    holders = (name for name, tree in layers.items() if _holds(OmegaConf.to_container(tree), location))
    place = next(holders, next(name for name in layers if name != _COMMAND_LINE))
    where = _where(place)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}; {key_advice(Config, location)}"
    if first["type"] == "missing":
        return f"missing key {key!r} {where}; add it"
    if isinstance(first["input"], dict):  # values that do not go together; the message says which
        section = f" for {key!r}" if key else ""
        return f"bad values{section} in {_name(layers)}: {message}"
    got = "" if location[:2] == _SECRET else f" (got {first['input']!r})"
    return f"bad value for {key!r} {where}: {message}{got}"


def _holds(tree: Any, location: tuple[int | str, ...]) -> bool:
    for key in location:
        if not isinstance(tree, dict):  # a list: it is given as a whole
            return True
        if key not in tree:
            return False
        tree = tree[key]
    return True


def key_advice(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What to write instead of the unknown key at `location` in data for `model`: one like it, or any."""
    section: Any = model
    for part in location[:-1]:
        if get_origin(section) is dict:  # whose keys are names that the user gives
            section = get_args(section)[1]
            continue
        section = section.model_fields[part].annotation
        if get_origin(section) is types.UnionType:
            section = get_args(section)[0]
    keys = list(section.model_fields)
    for nearest in difflib.get_close_matches(str(location[-1]), keys, n=1):
        return f"did you mean {'.'.join([*map(str, location[:-1]), nearest])!r}?"
    return f"there are {', '.join(keys)}"
