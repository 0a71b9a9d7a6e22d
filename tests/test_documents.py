"""Documents say what is so: links and paths lead somewhere, and commands and keys that they name exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from pipelines.cli import app
from pipelines.config import Config
from pipelines.config.base import Section

ROOT = Path(__file__).parents[1]
# Model cards are of the weights' time, and stay as they were written. Runs write cards of their own.
DOCUMENTS = [
    path
    for path in sorted(ROOT.glob("[!.]*/**/*.md")) + sorted(ROOT.glob("*.md"))
    if not {"weights", "runs"} & {*path.relative_to(ROOT).parts}
]
TOP_LEVEL = ("prophy/", "pipelines/", "cluster/", "tests/")


def text_of(document: Path) -> str:
    return document.read_text()


def test_the_documents_are_there() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert names >= {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "prophy/README.md",
        "prophy/METHOD.md",
        "pipelines/README.md",
        "cluster/README.md",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = text_of(document)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        path = document.parent / place if place else document
        assert path.exists(), f"{target} leads nowhere"
        if anchor:
            assert f'<a id="{anchor}">' in path.read_text(), f"{target} has no such anchor"
    for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|yaml|md))`", text):
        if name.startswith(TOP_LEVEL) or re.search(r"\.(py|yaml|md)$", name):
            bases = (ROOT, document.parent, *document.parent.glob("*/"))
            assert any((base / name).exists() for base in bases), f"{name} is not there"


def test_the_tree_of_the_readme_is_true() -> None:
    tree = re.findall(r"^([\w.]+/?[\w/]*) {2,}\S", text_of(ROOT / "README.md"), flags=re.MULTILINE)
    assert len(tree) > 5
    for name in tree:
        assert (ROOT / name).exists(), f"{name} is not there"
        assert (ROOT / name).is_dir() == name.endswith("/"), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(document: Path) -> None:
    commands: Any = typer.main.get_command(app)
    code = re.findall(r"`[^`\n]+`|^ {4}.*$", text_of(document), flags=re.MULTILINE)
    for line in re.findall(r"\bprophy ((?:--)?[a-z][^`|&#\n]*)", "\n".join(code)):
        first, *words = line.split()
        command: Any = commands
        if not first.startswith("--"):
            assert first in commands.commands, f"`prophy {first}` does not exist"
            command = commands.commands[first]
        if words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words[0]]
        for word in (word for word in (first, *words) if word.startswith("--")):
            assert word in options(command) | {"--help"}, f"prophy {line}"


def options(command: typer.core.TyperGroup | typer.core.TyperCommand) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_keys_exist(document: Path) -> None:
    """`train.seed` in backticks and what --set is given."""
    text = text_of(document)
    sections = {name for name, field in Config.model_fields.items() if is_section(field.annotation)}
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[`=: ]", text) + re.findall(r"--set ([a-z_.]+)=", text)
    model: Any
    for key in named:
        first, *rest = key.split(".")
        if first not in sections or rest[-1] in ("py", "yaml"):
            continue
        model = Config.model_fields[first].annotation
        for part in rest:
            assert is_section(model) and part in model.model_fields, f"{key} is no key"
            model = model.model_fields[part].annotation


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_make_targets_exist_and_lines_are_short(document: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:`|^ {4})make ([\w-]+)", text_of(document), flags=re.MULTILINE):
        assert target in targets, f"`make {target}` does not exist"
    if document.parent.name != "cluster":
        for number, line in enumerate(text_of(document).splitlines(), start=1):
            assert len(line) <= 110 or line.startswith("|"), f"line {number} has {len(line)} characters"


def test_descriptions_begin_with_what_they_describe() -> None:
    """`revision: of a hub id` makes a reader go back; `revision: a hub id's` does not."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in TOP_LEVEL
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.match(r'\s+\w+: of [^"]*$|\s*"""Of |.*\bhelp="[Oo]f ', line)
    ]
    assert not found
