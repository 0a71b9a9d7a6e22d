"""A job submitted to a cluster that asks for a token."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
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
PATIENCE_S = 60

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A head node with token authentication; yields the address of its job server.

    Another process may take a port before the head does: then it ends, and is started anew on others.
    """
    log = tmp_path / "head.log"
    for _ in range(3):
        head, address = start_head(log)
        try:
            if answers(head, address):
                yield address
                return
        finally:
            started = [*head.children(recursive=True), head] if head.is_running() else []
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=30)
    pytest.fail(f"no head node: {log.read_text()[-3000:]}")


def start_head(log: Path) -> tuple[psutil.Popen, str]:
    """Its process, and the address that it is to have."""
    port = free_port()
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{BIN}:{os.environ['PATH']}"}
    # Another Ray may run here, on the default ports; 0 is any that is free.
    ports = ["--port=0", "--dashboard-agent-listen-port=0", f"--dashboard-port={port}"]
    ports.append(f"--ray-client-server-port={free_port()}")
    with log.open("w") as output:
        head = psutil.Popen(
            [BIN / "ray", "start", "--head", "--block", "--num-cpus=8", *ports],
            env=os.environ | environment,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return head, f"http://127.0.0.1:{port}"


def answers(head: psutil.Popen, address: str) -> bool:
    """Whether its job server can be reached, once that is known."""
    deadline = time.monotonic() + PATIENCE_S
    while head.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}).is_success:
                return True
        time.sleep(0.2)
    return False


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

    deadline = time.monotonic() + PATIENCE_S
    done = submit(cluster, TOKEN, *cache)
    while "No available agent" in done.stderr and time.monotonic() < deadline:  # it is still starting
        done = submit(cluster, TOKEN, *cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(Path(config.cache.output) / "priors" / "index.parquet").num_rows == 3
