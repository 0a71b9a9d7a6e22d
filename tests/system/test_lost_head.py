"""`prophy serve` on a head and two nodes. The head keeps in Redis what it knows, is lost, and comes back."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import new_database, postgres_server
from tests.endpoint import GENERATOR, Server
from tests.nodes import Nodes, cluster
from tests.servers import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a server that answers."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            until(lambda: answers(port), "Redis answers")
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.fixture
def nodes(redis: str) -> Iterator[Nodes]:
    with cluster(redis=redis) as found:
        yield found


def test_the_head_is_lost_and_comes_back(nodes: Nodes, tmp_path: Path) -> None:
    """Replicas go on with their videos; the endpoint, whose proxy was there, answers again by itself."""
    for _ in range(2):
        nodes.add(num_cpus=1)
    with postgres_server() as folder:
        server = Server(tmp_path, nodes, f"serve.database={new_database(folder)}", "serve.num_cpus=1")
        ids = server.burst(6)
        until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
        replicas = server.processes(GENERATOR)
        nodes.kill_head()
        until(lambda: server.count(ids, "in_progress") == -1, "the endpoint is away")
        nodes.restart_head()
        until(lambda: server.count(ids, "in_progress") == 2, "the same two are in progress")
        server.go()
        server.check_all_made_once(ids, num_interrupted=0)
        assert server.processes(GENERATOR) == replicas
        server.stop()
