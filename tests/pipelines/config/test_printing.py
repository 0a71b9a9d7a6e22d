"""A configuration explains itself: every key is described, printed, and known to editors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.config import Config, json_schema, load_config, preset_names, section_to_yaml, to_yaml
from pipelines.config.base import Section
from pipelines.config.loading import PRESETS
from pipelines.config.printing import SCHEMA_FILE
from prophy.errors import ProPhyError

WRITE_SCHEMA = "prophy config --schema > pipelines/config/presets/schema.json"


def sections(model: type[Section] = Section) -> Iterator[type[Section]]:
    for own in model.__subclasses__():
        yield own
        yield from sections(own)


def test_every_key_is_described() -> None:
    models = list(sections())
    assert Config in models and len(models) > 10
    bare = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not bare, f"without a docstring below the field: {', '.join(bare)}"


def test_every_key_is_printed_with_its_description() -> None:
    config = load_config("tiny", ["train.seed=7"])
    text = to_yaml(config)
    assert Config.model_validate(yaml.safe_load(text)) == config
    comments = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if "#" in line)
    for model in sections():
        for name, field in model.model_fields.items():
            assert " ".join((field.description or "").split()) in comments, f"{model.__name__}.{name}"
    assert "Default: 0." in section_to_yaml(config, "train.seed")
    assert "Default" not in section_to_yaml(config, "train.num_steps")
    assert "One of: frozen, lora, full." in section_to_yaml(config, "train")
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    "value",
    [
        *["a: b # c", "'quoted'", "two\nlines", "ends with a space ", "", "null", "é" * 200],
        *["12e4567", "1e5", "-1e5", "+1e5", ".5e1", "1_0e5", "0x1f", "010", "1:30", "2024-01-01", ".inf"],
        *["${x}", "a ${x} b", "\\${x}", "\\\\${x}\\", "a\x85b", "a\u2028b", "a\u2029b", "\t", "yes", "1e"],
    ],
)
def test_texts_are_read_back_as_they_were(value: str, tmp_path: Path) -> None:
    config = load_config("tiny")
    sampling = config.sampling.model_copy(update={"negative_prompt": value})
    train = config.train.model_copy(update={"sample_prompts": [value, value]})
    backbone = config.backbone.model_copy(update={"revision": value})
    changed = config.model_copy(update={"sampling": sampling, "train": train, "backbone": backbone})
    (tmp_path / "printed.yaml").write_text(to_yaml(changed))
    assert load_config(str(tmp_path / "printed.yaml")) == changed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "unknown key 'trian'; did you mean 'train'"),
        ("train.num_step", "did you mean 'train.num_steps'"),
        ("train.seed.x", "it has no parts"),
        ("physics", "needs the section 'physics'"),
    ],
)
def test_a_part_that_is_not_there(name: str, message: str) -> None:
    lacking = Config.model_validate(
        {key: value for key, value in load_config("tiny").model_dump().items() if key != "physics"}
    )
    with pytest.raises(ProPhyError, match=message):
        section_to_yaml(lacking, name)


def test_a_part_keeps_its_place() -> None:
    limits = yaml.safe_load(section_to_yaml(load_config("tiny"), "cache.limits"))
    assert limits == {"cache": {"limits": load_config("tiny").cache.limits.model_dump()}}


def test_the_schema_for_editors_is_up_to_date() -> None:
    assert SCHEMA_FILE.read_text() == json_schema(), f"the schema is stale; run `{WRITE_SCHEMA}`"


@pytest.mark.parametrize("name", [*preset_names(), "base"])
def test_presets_name_the_schema_and_fit_it(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_FILE.name}"
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.validate(yaml.safe_load(text), schema)
    mistakes: list[dict[str, dict[str, Any]]] = [
        {"train": {"num_step": 1}},
        {"train": {"num_steps": 0}},
        {"train": {"recipe": "x"}},
        {"trian": {}},
    ]
    for wrong in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
