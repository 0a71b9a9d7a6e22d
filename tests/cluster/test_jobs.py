"""The cluster's jobs: what runs where, with which preset, on how many GPUs."""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.cluster.submitter import run_submitter

ROOT = Path(__file__).parent.parent.parent
PROPHY = Path(sys.executable).parent / "prophy"
JOB = yaml.safe_load((ROOT / "ray_job.yaml").read_text())


def test_the_whole_job_runs_on_the_cluster(tmp_path: Path) -> None:
    ran, status = run_submitter(JOB, tmp_path)
    assert ran == [f"head: prophy {command} --config wan2.1-1.3b" for command in ("cache", "train")]
    assert status == "SUCCEEDED"


def test_a_cache_that_fails_is_not_trained_on(tmp_path: Path) -> None:
    ran, status = run_submitter(JOB, tmp_path, fails="cache")
    assert [line.split()[2] for line in ran] == ["cache"]
    assert status == "FAILED"


def test_the_cluster_can_grow_to_what_the_preset_wants(tmp_path: Path) -> None:
    for line in run_submitter(JOB, tmp_path)[0]:
        command = line.removeprefix("head: prophy ").split()
        shown = subprocess.run([PROPHY, *command, "--print-config"], capture_output=True, check=True)
    config = yaml.safe_load(shown.stdout)
    workers = JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    wanted = config["train"]["num_workers"] * config["train"]["gpus_per_worker"]
    assert wanted <= int(limits["nvidia.com/gpu"]) * workers["maxReplicas"]
