"""A node that is about to be taken away: training saves when the notice comes, and goes on on another."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from pipelines.config import Config
from pipelines.layout import METRICS_FILE
from pipelines.training import train
from pipelines.training.checkpoint_places import FolderStore
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

NUM_STEPS = 30
OVERRIDES = (
    "train.num_workers=1",
    "train.cpus_per_worker=4",  # the head has no room for it
    "train.save_every=1000",
    "train.log_every=1",
    f"train.num_steps={NUM_STEPS}",
)
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, to which a test adds nodes; beside the Ray of the session."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dashboard = {"include_dashboard": True, "dashboard_port": probe.getsockname()[1]}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **dashboard})
    yield cluster
    cluster.shutdown()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    while not happened():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    metrics = run_dir / "train" / METRICS_FILE
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def test_a_notice_saves_and_another_node_goes_on(
    cluster: Cluster, tiny_cache: Config, tmp_path: Path
) -> None:
    overrides = (f"cache.output={tiny_cache.cache.output}", *OVERRIDES)
    doomed = cluster.add_node(num_cpus=4)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    options = [part for override in (f"run_dir={run_dir}", *overrides) for part in ("--set", override)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "train", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "RAY_ADDRESS": cluster.address},
        )
    try:
        wait_until(lambda: len(losses(run_dir)) >= 2, process, log)
        notice = [RAY, "drain-node", "--address", cluster.address, "--node-id", doomed.node_id]
        notice += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*notice, "--deadline-remaining-seconds", "600"], check=True)
        checkpoints = FolderStore(str(run_dir / "train" / "checkpoints"))
        wait_until(lambda: bool(checkpoints.committed()), process, log)
        cluster.add_node(num_cpus=4)
        cluster.remove_node(doomed, allow_graceful=False)
        assert process.wait() == 0, log.read_text()[-3000:]
    finally:
        process.kill()

    saved = sorted(checkpoints.committed())
    assert len(saved) == 2 and saved[0] < saved[1] == NUM_STEPS

    undisturbed = tiny_config(tmp_path / "undisturbed", *overrides)
    expected = load_file(train.run(undisturbed) / "physics_branch.safetensors")
    found = load_file(run_dir / "model" / "physics_branch.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(run_dir) == losses(undisturbed.run_dir)
