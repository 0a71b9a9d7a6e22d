"""`prophy serve` killed under load, in parts or as a whole: every accepted job is finished, and none twice.

One real server with a Ray of its own; only its model is a stand-in, which waits until it may go on. Replicas
of half a CPU scale from zero to two, and back.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.endpoint import GENERATOR, INGRESS, SETTINGS, Server
from tests.servers import until

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kill"))
    yield server
    server.stop()


def test_the_endpoint_alone_is_open_to_other_machines(server: Server) -> None:
    listening: dict[int, str] = {}
    # One that Serve has replaced stays for as long as it has a connection, and listens no more.
    for haproxy in server.processes("bin/haproxy"):
        with suppress(psutil.NoSuchProcess):
            listening |= {
                connection.laddr.port: connection.laddr.ip
                for connection in haproxy.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    assert listening == {server.client.base_url.port: "0.0.0.0"}


few_or_many = pytest.mark.parametrize("num_jobs", [8, pytest.param(50, marks=pytest.mark.slow)])


@few_or_many
def test_replicas_come_and_go_with_the_queue(server: Server, num_jobs: int) -> None:
    until(lambda: server.num_replicas() == 0, "no replica is left")
    ids = server.burst(num_jobs)
    seen = [0]

    def are_two() -> bool:
        seen.append(server.num_replicas())
        return seen[-1] == 2

    until(are_two, "there are two replicas")
    assert seen == sorted(seen)
    server.go()
    server.check_all_made_once(ids, num_interrupted=0)
    until(lambda: server.num_replicas() == 0, "no replica is left")


@few_or_many
@pytest.mark.parametrize(
    ("actor", "count"),
    [
        pytest.param(GENERATOR, 1, id="one replica"),
        pytest.param(GENERATOR, 2, id="all replicas"),
        pytest.param(INGRESS, 1, id="ingress"),
        pytest.param("ray::.*ServeController", 1, id="controller", marks=pytest.mark.slow),
        pytest.param("bin/haproxy", 1, id="haproxy", marks=pytest.mark.slow),
        pytest.param("ray::.*HAProxyManager", 1, id="manager of haproxy", marks=pytest.mark.slow),
        pytest.param("ray::.*ProxyActor", 1, id="proxy", marks=pytest.mark.slow),
    ],
)
def test_killed_in_mid_video(server: Server, actor: str, count: int, num_jobs: int) -> None:
    ids = server.burst(num_jobs)
    until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
    server.kill(actor, count)
    server.go()
    server.check_all_made_once(ids, num_interrupted=2)


def test_a_device_that_fails_costs_no_job(server: Server) -> None:
    """Every later call fails too, and at once: such a replica must not take one job after the other."""
    (server.folder / "device error").touch()
    ids = server.burst(5)
    server.go()
    server.check_all_made_once(ids, num_interrupted=1)
    assert not (server.folder / "device error").exists()


@few_or_many
def test_stopped_in_mid_video_and_started_again(server: Server, num_jobs: int) -> None:
    ids = server.burst(num_jobs)
    until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
    server.stop()
    server.start()
    server.go()
    server.check_all_made_once(ids, num_interrupted=2)


@pytest.mark.slow
def test_a_model_that_cannot_run_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    command = [sys.executable, "-m", "tests.waiting_server", "serve"]
    for item in (f"run_dir={tmp_path}", "ray.num_cpus=1", *SETTINGS):
        command += ["--set", item]
    server = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.PIPE, text=True, check=False
    )
    assert server.returncode == 2
    assert server.stderr.endswith(
        "error: VideoGenerator does not start: MemoryError: no memory for the model\n"
    )
