"""`prophy serve` on a cluster, killed alone: the endpoint lives on, and the same command goes on with it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.endpoint import GENERATOR, INGRESS, Server
from tests.nodes import Nodes, cluster
from tests.servers import until

pytestmark = pytest.mark.heavy


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with cluster(head_cpus=1) as found:
        yield found


@pytest.mark.slow
def test_a_killed_command_is_followed_by_the_same_one(nodes: Nodes, tmp_path: Path) -> None:
    server = Server(tmp_path, nodes)
    url, ids = server.client.base_url, server.burst(4)
    until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
    actors = server.processes(f"{GENERATOR}|{INGRESS}")
    server.process.kill()
    server.process.wait()
    other = [*server.command, "--set", "serve.max_queued=7"]
    refused = subprocess.run(other, env=server.environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "a server with other settings runs here: serve differ" in refused.stderr

    server.start()
    assert server.client.base_url == url
    server.go()
    server.check_all_made_once(ids, num_interrupted=0)
    assert {*server.processes(f"{GENERATOR}|{INGRESS}")} == {*actors}

    server.stop()
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
