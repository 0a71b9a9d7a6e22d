"""A job, and the service of `cluster/base/service`, on a cluster that asks for a token."""

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
import yaml

from pipelines.sandbox import simulate
from pipelines.serving.middleware import hash_key
from tests.conftest import tiny_config
from tests.servers import make

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TOKEN = "f" * 64
KEY = "a client's"
PATIENCE_S = 240

pytestmark = pytest.mark.heavy


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
    environment["PROPHY_API_KEY_HASHES"] = f"[{hash_key(KEY)}]"
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


def last_words(log: Path) -> str:
    """How the head's own log ends, and those of its job server."""
    logs = [log, *Path(os.environ["RAY_TMPDIR"]).glob("ray/session_latest/logs/dashboard*.log")]
    return "".join(f"\n== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


def submit(address: str, token: str, *command: str) -> subprocess.CompletedProcess[str]:
    return as_user(token, "ray", "job", "submit", "--address", address, "--working-dir", ROOT, "--", *command)


def as_user(token: str, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command, *arguments],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
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
    assert done.returncode == 0, done.stdout + done.stderr + last_words(tmp_path / "head.log")
    assert pq.read_table(Path(config.cache.output) / "priors" / "index.parquet").num_rows == 3


@pytest.mark.slow
def test_the_service_is_deployed_from_its_manifest(cluster: str, tmp_path: Path) -> None:
    manifest = yaml.safe_load((ROOT / "cluster/base/service/service.yaml").read_text())
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    served["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    [application] = served["applications"]
    [keys] = [option for option in application["args"]["set"] if option.startswith("serve.api_keys=")]
    smaller = ["serve.host=0.0.0.0", "backbone.num_frames=5", "sampling.num_inference_steps=1"]
    application["args"] = {"config": "tiny", "set": [f"run_dir={tmp_path}/run", keys, *smaller]}
    file = tmp_path / "served.yaml"
    file.write_text(yaml.safe_dump(served))

    done = as_user(TOKEN, "serve", "deploy", "--address", cluster, file)
    assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{served['http_options']['port']}"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").is_success:
                break
        time.sleep(0.5)
    assert httpx.get(f"{url}/v1/videos").status_code == 401
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        assert make(client)[4:8] == b"ftyp"
