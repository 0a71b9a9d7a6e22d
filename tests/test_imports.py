"""The one direction in which imports run, and that the project asks for what it imports."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from diffusers import pipelines as diffusers_pipelines

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "prophy").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])

# What a layer may import: everything below its own line, and its own folder.
LAYERS = {
    "prophy": (
        ("pretraining",),
        ("evaluation",),
        ("training",),
        ("backbones.encoding", "backbones.loading", "backbones.memory"),
        ("backbones.pretrained",),
        ("backbones.families", "backbones.wan", "backbones.cogvideox"),
        ("generation", "priors", "tiny"),
        ("models", "training.losses", "training.objectives"),
        ("sandbox",),
        (
            "backbones",
            "schema",
            "video",
            "decoder",
            "frames",
            "picture",
            "images",
            "taxonomy",
            "registry",
            "device",
            "errors",
            "hashing",
            "sheets",
            "leases",
            "places",
            "staging",
            "stores",
            "token_frames",
        ),
    ),
    "pipelines": (
        ("cli",),
        ("demo", "doctor"),
        ("evaluation",),
        ("sandbox.pretrain",),
        ("serving", "training"),
        ("generation",),
        ("caching",),
        ("sandbox",),
        ("actors", "runtime", "resources", "metrics"),
        ("config",),
        ("layout", "pictures"),
    ),
}
"""Beginnings of module names, topmost first; the longest that fits counts."""
APART = ({"serving", "training"},)
"""Folders of one layer that must not know each other."""


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_method_does_not_know_the_product() -> None:
    for file in (file for file in FILES if file.is_relative_to(ROOT / "prophy")):
        roots = {module.split(".")[0] for module in imported(file)}
        assert not roots & {"ray", "deepspeed", "fastapi", "pipelines"}, file


def test_own_modules_are_there() -> None:
    """For mypy all that is missing is a third party's."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("prophy.", "pipelines.")):
                place = ROOT.joinpath(*str(node.module).split("."))
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{file} imports {node.module}"


def layer_of(package: str, name: str) -> int | None:
    """The layer of the module `package.name`; none is of the package itself."""
    fits = [
        (len(start), level)
        for level, starts in enumerate(LAYERS[package])
        for start in starts
        if f"{name}.".startswith(f"{start}.")
    ]
    return max(fits, default=(0, None))[1]


def test_layers_import_downwards() -> None:
    for file in FILES:
        package, *parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        own = layer_of(package, name)
        assert own is not None or not name, f"{file} has no layer"
        for module in imported(file):
            root, _, rest = module.partition(".")
            other = layer_of(package, rest) if root == package and rest else None
            if other is None or own is None:
                continue
            assert other >= own, f"{file} imports {module}"
            folders = {name.split(".")[0], rest.split(".")[0]}
            assert folders not in APART, f"{file} imports {module}"


def test_benchmarks_run_as_scripts() -> None:
    """`python tests/benchmarks/NAME.py` finds what is installed, and no `tests`; `--help` explains it."""
    for file in sorted((ROOT / "tests" / "benchmarks").glob("*.py")):
        assert "tests" not in {module.split(".")[0] for module in imported(file)}, file
        assert "argparse.ArgumentParser(" in file.read_text(), file


NETWORKS = {"torch", "diffusers", "transformers", "peft", "deepspeed"}


def loaded_by(*modules: str) -> set[str]:
    """The packages that a fresh process has loaded once it has imported `modules`."""
    program = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_drivers_import_no_networks() -> None:
    """They would cost each command seconds before its first sign of life."""
    drivers = (
        "caching.cache",
        "caching.verify",
        "caching.prune",
        "training.train",
        "generation.generate",
        "serving.serve",
        "doctor",
    )
    loaded = loaded_by(*(f"pipelines.{name}" for name in drivers))
    assert not loaded & (NETWORKS | {"matplotlib", "pymunk"})


def test_pictures_of_a_cache_take_no_networks() -> None:
    assert not loaded_by("pipelines.caching.inspect") & (NETWORKS | {"pymunk"})


def test_the_trainer_imports_torch_alone() -> None:
    """Which Ray's own does: networks and DeepSpeed are the workers'."""
    assert loaded_by("pipelines.training.trainer") & NETWORKS == {"torch"}


def test_the_endpoint_knows_no_ray() -> None:
    """As its docstrings say: another server could run it."""
    modules = ("api", "dispatcher", "jobs", "service", "artefacts", "protocol", "middleware", "replica")
    loaded = loaded_by(*(f"pipelines.serving.{name}" for name in modules))
    assert not loaded & (NETWORKS | {"ray"})


def test_no_folder_is_named_like_a_diffusers_pipeline() -> None:
    """Diffusers would save a component in such a folder under the wrong module, and fail to load it."""
    taken = {path.name for path in Path(diffusers_pipelines.__file__).parent.iterdir() if path.is_dir()}
    ours = {path.name for path in (ROOT / "prophy").rglob("*") if path.is_dir()}
    assert not (taken & ours) - {"__pycache__"}


def normalised(requirements: Iterable[str]) -> set[str]:
    """The names of requirements, without extras and versions, as package indices compare them."""
    names = [re.findall(r"^[\w.-]+", requirement)[0] for requirement in requirements]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_every_package_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for_users = normalised(project["dependencies"])
    for_tests = for_users | normalised(project["optional-dependencies"]["dev"])
    here = {"prophy", "pipelines", "tests", *sys.stdlib_module_names}
    packages = packages_distributions()
    for file in (*FILES, *(ROOT / "tests").rglob("*.py")):
        asked_for = for_tests if file.is_relative_to(ROOT / "tests") else for_users
        beside = {path.stem for path in file.parent.glob("*.py")}
        for root in {module.split(".")[0] for module in imported(file)} - here - beside:
            assert normalised(packages.get(root, [])) & asked_for, f"{file} imports {root}"
