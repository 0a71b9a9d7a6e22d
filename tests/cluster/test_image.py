"""The image of every node, followed without docker."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from pipelines.runtime import WORKER_ENVIRONMENT
from pipelines.serving import haproxy
from tests.cluster.manifests import RAY_JOB, ROOT, ray_clusters, templates

LINES = (ROOT / "cluster/Dockerfile").read_text().replace("\\\n", " ").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]


def arguments(instruction: str) -> list[list[str]]:
    return [words.split() for name, words in STEPS if name == instruction]


def test_image_sets_what_a_local_ray_starts_with() -> None:
    image = {name: value for words in arguments("ENV") for name, value in (word.split("=") for word in words)}
    assert image.pop("TQDM_DISABLE") == "1"
    folder = Path("/folder")
    local = WORKER_ENVIRONMENT | haproxy.environment(folder)
    of_one_server = {
        name for name, value in local.items() if name.endswith("_PORT") or value.startswith(str(folder))
    }
    assert image.keys() == local.keys() - of_one_server
    for name, value in image.items():
        assert Path(value).name == Path(local[name]).name  # the command lies elsewhere there


def test_image_has_what_is_loaded_by_name_alone() -> None:
    """NCCL takes TCP where it finds no RDMA libraries; DeepSpeed and Triton call a compiler."""
    installed = {word for words in arguments("RUN") if "apt-get" in words for word in words}
    assert installed >= {"libibverbs1", "ibverbs-providers", "librdmacm1", "g++"}


@pytest.mark.heavy
def test_the_wheel_holds_what_the_product_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for *names, _ in arguments("COPY")[:3]:
        for name in names:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
    [build] = [line for _, line in STEPS if line.startswith("pip wheel")]
    words = build.replace("/wheels", str(tmp_path / "wheels")).split()
    # `--no-build-isolation` fetches no other setuptools.
    command = [sys.executable, "-m", *words[:2], "--no-build-isolation", *words[2:]]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheels").iterdir()
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "prophy", "pipelines"], cwd=ROOT, capture_output=True, text=True
    )
    said_to_people = {".md", ".png", ".txt", ".webp"}
    read = {name for name in tracked.stdout.split() if Path(name).suffix not in said_to_people}
    assert read and read <= held
    assert not [name for name in held if name.startswith("tests")]


def test_the_image_is_what_the_manifests_ask_for() -> None:
    user = arguments("USER")[-1][0]
    for cluster in ray_clusters(yaml.safe_load(RAY_JOB.read_text())):
        for pod in templates(cluster):
            assert str(pod["securityContext"]["runAsUser"]) == user
            assert pod["containers"][0]["image"] in LINES[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [asked] = re.findall(r"prophy-ray\[(\w+)\]", "\n".join(LINES))
    assert asked in extras
