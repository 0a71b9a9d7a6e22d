"""The batch script, with stand-ins for Slurm and Ray."""

import os
import subprocess
from pathlib import Path

from pipelines.runtime import WORKER_ENVIRONMENT
from tests.cluster.manifests import ROOT

STANDINS = {
    "scontrol": "printf 'node7\\nnode8\\n'",
    "srun": 'echo "srun with $SRUN_CPUS_PER_TASK CPUs" >> "$PLACE/ran"; shift; exec "$@"',
    "ray": 'echo "ray $1 $2 $3 $4 $5 $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$PLACE/ran"; shift 6; exec "$@"',
    "prophy": 'echo "prophy $* at $RAY_ADDRESS" >> "$PLACE/ran"; env > "$PLACE/environment"',
}


def test_a_batch_job_starts_ray_then_caches_and_trains(tmp_path: Path) -> None:
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLACE": str(tmp_path)}
    environment |= {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }
    options = ["wan2.1-14b", "--set", "cache.input=/mnt/my videos"]
    subprocess.run(["bash", ROOT / "cluster/slurm.sbatch", *options], env=environment, check=True)
    shown = "--config wan2.1-14b --set cache.input=/mnt/my videos at node7:6379"
    assert (tmp_path / "ran").read_text().splitlines() == [
        "srun with 64 CPUs",
        "ray symmetric-run --address node7:6379 --min-nodes 2 token 64",
        f"prophy cache {shown}",
        f"prophy train {shown}",
    ]
    lines = (tmp_path / "environment").read_text().splitlines()
    started_with = dict(line.split("=", 1) for line in lines if "=" in line)
    assert WORKER_ENVIRONMENT.items() <= started_with.items()
    assert int(started_with["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 600
