"""The Kubernetes objects that `cluster/` and `ray_job.yaml` make."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
RAY_JOB = ROOT / "ray_job.yaml"
OVERLAYS = sorted(path.parent for path in (ROOT / "cluster/overlays").glob("*/*/kustomization.yaml"))


def built(overlay: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send; skips where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def ray_clusters(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The specification of the Ray cluster that an object brings, if it does."""
    spec = found["spec"]
    if found["kind"] == "RayCluster":
        yield spec
    for name in ("rayClusterSpec", "rayClusterConfig"):
        if name in spec:
            yield spec[name]


def templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of the head and of the workers."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
