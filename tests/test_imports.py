"""The one direction in which imports run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import pipelines as diffusers_pipelines

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "prophy").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])

# What a layer of prophy may import of prophy: everything below its own line.
LAYERS = (
    ("evaluation", "tiny/pretrain"),
    ("train_module",),
    ("data", "backbones", "encoding"),
    ("pretrained",),
    ("generation", "priors", "tiny"),
    ("models", "losses", "objectives"),
    ("sandbox",),
    ("families", "schema", "video", "taxonomy", "device", "errors"),
)
"""Beginnings of paths, topmost first. In `tiny/`, what builds a model lies low, what trains it lies high."""


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_method_does_not_know_the_product(file: Path) -> None:
    if file.is_relative_to(ROOT / "prophy"):
        roots = {module.split(".")[0] for module in imported(file)}
        assert not roots & {"ray", "deepspeed", "fastapi", "pipelines"}


def layer_of(path: str) -> int | None:
    return next((level for level, names in enumerate(LAYERS) if path.startswith(names)), None)


@pytest.mark.parametrize(
    "file", [f for f in FILES if "prophy" in f.parts], ids=lambda f: str(f.relative_to(ROOT))
)
def test_layers_import_downwards(file: Path) -> None:
    own = layer_of(str(file.relative_to(ROOT / "prophy")))
    for module in imported(file):
        package, _, rest = module.partition(".")
        other = layer_of(rest.replace(".", "/")) if package == "prophy" and rest else None
        if own is not None and other is not None:
            assert other >= own, f"{file.name} imports {module}"


def test_drivers_import_no_networks() -> None:
    """They would cost each command six seconds before its first sign of life."""
    drivers = "pipelines.cache, pipelines.verify, pipelines.generate, pipelines.serve"
    heavy = f"import sys, {drivers}; print({{'torch', 'transformers', 'diffusers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_folder_is_named_like_a_diffusers_pipeline() -> None:
    """Diffusers would save a component in such a folder under the wrong module, and fail to load it."""
    taken = {path.name for path in Path(diffusers_pipelines.__file__).parent.iterdir() if path.is_dir()}
    ours = {path.name for path in (ROOT / "prophy").rglob("*") if path.is_dir()}
    assert not (taken & ours) - {"__pycache__"}
