"""A job submitted to a cluster that asks for a token."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from pipelines.sandbox import simulate
from tests.conftest import tiny_config

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TOKEN = "f" * 64


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A head node with token authentication; yields the address of its job server."""
    port = free_port()
    ports = [  # another Ray may run here, on the default ones
        f"--dashboard-port={port}",
        *(
            f"--{name}={free_port()}"
            for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port")
        ),
    ]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=8", *ports],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}).is_success:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    yield address
    started = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in started:
        process.kill()
    psutil.wait_procs(started, timeout=30)


def submit(address: str, token: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", *command],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_submitted_cache_job_runs_and_wants_the_token(cluster: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "simulate.num_clips=3")
    simulate.run(config)
    cache = ("prophy", "cache", "--set", f"run_dir={config.run_dir}", "--set", "simulate.num_clips=3")

    refused = submit(cluster, "0" * 64, *cache)
    assert refused.returncode != 0
    assert not Path(config.cache.output).exists()

    done = submit(cluster, TOKEN, *cache)
    while "No available agent" in done.stderr:  # the cluster is still starting
        done = submit(cluster, TOKEN, *cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(Path(config.cache.output) / "priors" / "index.parquet").num_rows == 3
