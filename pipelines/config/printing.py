"""A configuration as YAML whose comments explain every key, and the JSON schema that editors read."""

import functools
import json
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from pipelines.config.base import Section
from pipelines.config.loading import PRESETS, key_advice
from pipelines.config.run import Config
from prophy.errors import ProPhyError

SCHEMA_FILE = PRESETS / "schema.json"

_WIDTH = 100


def to_yaml(config: Config) -> str:
    """The resolved configuration, every key explained, as a file that `load_config` reads back."""
    return "\n".join(_lines(config, 0)) + "\n"


def section_to_yaml(config: Config, name: str) -> str:
    """A part of it: a section such as `train` or `cache.limits`, or a single key such as `train.seed`.

    Raises:
        ProPhyError: there is no such section or key, or this configuration lacks it.
    """
    parts = name.split(".")
    lines: list[str] = []
    section: Any = config
    for depth, key in enumerate(parts):
        if not isinstance(section, Section) or key not in type(section).model_fields:
            has_parts = isinstance(section, Section)
            hint = key_advice(Config, tuple(parts[: depth + 1])) if has_parts else "it has no parts"
            raise ProPhyError(f"unknown key {name!r}; {hint}")
        if depth < len(parts) - 1:
            lines.append(f"{'  ' * depth}{key}:")
        else:
            lines += _field(section, key, depth)
        section = getattr(section, key)
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """The JSON schema of a configuration file, which may leave out what the file it extends has."""
    schema = Config.model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        model.pop("required", None)
        model["properties"] = {key: _schema_of(value) for key, value in model["properties"].items()}
    schema["title"] = "A configuration of prophy"
    extends = "The preset or YAML file whose values this file starts from; it then says only what differs."
    schema["properties"] = {"extends": {"type": "string", "description": extends}, **schema["properties"]}
    return json.dumps(schema, indent=1) + "\n"


def _schema_of(value: dict[str, Any]) -> dict[str, Any]:
    """The schema of one key, whose value may also be a reference such as `${backbone.fps}`."""
    if "$ref" in value:
        return {key: value[key] for key in ("$ref", "description") if key in value}
    about = {key: value.pop(key) for key in ("description", "default") if key in value}
    value.pop("title", None)
    choices = value.pop("anyOf", None) or [value]
    if not any(choice.get("type") == "string" and len(choice) == 1 for choice in choices):
        choices = [*choices, {"type": "string", "pattern": r"\$\{.+\}"}]
    return about | (choices[0] if len(choices) == 1 else {"anyOf": choices})


def _lines(section: Section, depth: int) -> Iterator[str]:
    for index, name in enumerate(key for key in type(section).model_fields if key in section.__dict__):
        if index:
            yield ""
        yield from _field(section, name, depth)


def _field(section: Section, name: str, depth: int) -> Iterator[str]:
    """The lines of one key, or of the section that it names, after what is said of it."""
    indent, value = "  " * depth, getattr(section, name)
    about = type(section).model_fields[name]
    said = _paragraphs(about.description or "")
    if isinstance(value, Section):
        # The first paragraph of its docstring says what the key's description says.
        yield from _comment([*said, *_paragraphs(type(value).__doc__ or "")[1:]], indent)
        yield f"{indent}{name}:"
        yield from _lines(value, depth + 1)
        return
    choices = _choices(type(section)).get(name, [])
    yield from _comment([*said, *_keys_of_each(about), *_facts(about, choices, value)], indent)
    plain = section.model_dump(mode="json", include={name})[name]
    line = f"{indent}{name}: {_inline(plain)}"
    if isinstance(plain, list) and len(line) > _WIDTH:
        yield f"{indent}{name}:"
        yield from (f"{indent}  - {_inline(item)}" for item in plain)
    else:
        yield line


class _Dumper(yaml.SafeDumper):
    """Writes texts so that OmegaConf, whose numbers are not those of YAML 1.1, reads them back."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # What stands for itself, and is no reference; backslashes before it are doubled.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # `12e4567` is a number to OmegaConf, and the breaks of lines that are not \n become spaces.
    style = '"' if re.search(r"^[-+.]?\d|[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style)


_Dumper.add_representer(str, _text)


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.dump([value], None, _Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.strip()[1:-1]


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in textwrap.dedent(text).split("\n\n")]


def _keys_of_each(about: FieldInfo) -> list[str]:
    """The keys of each entry, where a key holds sections by names that the user gives."""
    if get_origin(about.annotation) is not dict:
        return []
    section = get_args(about.annotation)[1]
    if not (isinstance(section, type) and issubclass(section, Section)):
        return []
    keys = section.model_fields.items()
    return [f"{name}: {' '.join((field.description or '').split())}" for name, field in keys]


@functools.cache
def _choices(section: type[Section]) -> dict[str, list[Any]]:
    """The values of each key that has a fixed number of them."""
    keys = section.model_json_schema()["properties"].items()
    return {name: schema["enum"] for name, schema in keys if "enum" in schema}


def _facts(about: FieldInfo, choices: list[Any], value: object) -> list[str]:
    """The choices, where there is a fixed number; and the default, where this run has another value."""
    facts = [f"One of: {', '.join(map(str, choices))}."] if choices else []
    default = about.get_default(call_default_factory=True, validated_data={})
    if not about.is_required() and default != value:
        facts.append(f"Default: {_inline(default)}.")
    return facts


def _comment(paragraphs: list[str], indent: str) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from textwrap.wrap(
            paragraph, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
