"""Reads a configuration: a preset or any YAML file, with overrides, every key and value checked."""

import difflib
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipelines.config.run import Config
from prophy.errors import ProPhyError

_NULLS = ("", "~", "null")  # as YAML writes it


def preset_names() -> list[str]:
    """Names of the configurations that come with the product."""
    folder = resources.files("pipelines.config") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: list[str] | None = None) -> Config:
    """Reads, overrides, resolves and checks a configuration.

    Args:
        name_or_path: a preset's name, or the path of a YAML file.
        overrides: `section.key=value` each. The value of a key that takes a text or a path is that text, to
            the character; any other is read as YAML.

    Raises:
        ProPhyError: no such file, not YAML, an unknown key (names the nearest one), or a bad value.
    """
    path = _find(name_or_path)
    given, where = OmegaConf.create(), str(path)
    try:
        tree = OmegaConf.load(path)
        if overrides:
            where += " with what the command line adds"
            for override in overrides:
                key, _, text = override.partition("=")
                is_text, may_be_null = _takes_text(key)
                if is_text and not (may_be_null and text in _NULLS):
                    OmegaConf.update(given, key, text)
                else:
                    given.merge_with_dotlist([override])
        values = OmegaConf.to_container(OmegaConf.merge(tree, given), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        raise ProPhyError(f"{where} is not a valid configuration: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ProPhyError(_explain(error, path, OmegaConf.to_container(given))) from None


def _takes_text(key: str) -> tuple[bool, bool]:
    """Whether the value of a dotted key is a text or a path, and whether it may be null."""
    annotation: Any = Config
    for part in key.split("."):
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = None if field is None else field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    kinds = {get_args(member)[0] if get_origin(member) is Annotated else member for member in members}
    return bool(kinds & {str, Path}), types.NoneType in kinds


def _find(name_or_path: str) -> Path:
    if name_or_path in preset_names():
        return Path(str(resources.files("pipelines.config") / "presets" / f"{name_or_path}.yaml"))
    path = Path(name_or_path)
    if not path.is_file():
        raise ProPhyError(
            f"no configuration {name_or_path!r}; give a YAML file or one of: {', '.join(preset_names())}"
        )
    return path


def _explain(error: ValidationError, path: Path, given: Any) -> str:
    """One sentence about the first thing that is wrong in `path` and what is `given` on the command line."""
    first = error.errors()[0]
    key, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    where = "on the command line" if _holds(given, first["loc"]) else f"in {path}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}; did you mean {nearest_key(Config, first['loc'])!r}?"
    if first["type"] == "missing":
        return f"missing key {key!r} {where}; add it"
    if isinstance(first["input"], dict):  # values that do not go together; the message says which
        section = f" for {key!r}" if key else ""
        return (
            f"bad values{section} in {path}{' with what the command line adds' if given else ''}: {message}"
        )
    return f"bad value for {key!r} {where}: {message} (got {first['input']!r})"


def _holds(tree: Any, location: tuple[int | str, ...]) -> bool:
    for key in location:
        if not isinstance(tree, dict):  # a list: it is given as a whole
            return True
        if key not in tree:
            return False
        tree = tree[key]
    return True


def nearest_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The valid key, dotted, that is nearest to the unknown one at `location` in data for `model`."""
    section: Any = model
    for part in location[:-1]:
        section = section.model_fields[part].annotation
        if get_origin(section) is types.UnionType:
            section = get_args(section)[0]
    nearest = difflib.get_close_matches(str(location[-1]), list(section.model_fields), n=1, cutoff=0.0)[0]
    return ".".join([*map(str, location[:-1]), nearest])
