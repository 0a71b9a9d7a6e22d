"""`prophy serve` on three nodes, of which one is lost with its replica: the other makes all videos."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import new_database, postgres_server
from tests.endpoint import GENERATOR, Server
from tests.nodes import Nodes, cluster
from tests.servers import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with cluster() as found:
        yield found


def test_a_node_with_a_replica_is_lost(nodes: Nodes, tmp_path: Path) -> None:
    """The endpoint stays ready, though its second replica has no room any more."""
    nodes.add(num_cpus=1)
    doomed = nodes.add(num_cpus=1)
    with postgres_server() as folder:
        server = Server(tmp_path, nodes, f"serve.database={new_database(folder)}", "serve.num_cpus=1")
        ids = server.burst(6)
        until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
        nodes.kill(doomed)
        until(lambda: len(server.processes(GENERATOR)) == 1, "one replica is left")
        until(lambda: server.count(ids, "in_progress") == 1, "the video of the other waits again")
        assert server.client.get("/readyz").json() == {"status": "ready"}
        server.go()
        server.check_all_made_once(ids, num_interrupted=2)
        server.stop()
