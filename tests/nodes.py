"""A Ray cluster of several nodes on this machine, each with an address of its own, to be killed."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

HEAD, *_OTHERS = [f"127.0.0.{number}" for number in range(2, 10)]
# By default Ray looks for 15 s whether a node that does not answer is dead. What is killed refuses at once;
# what is only slow, on a busy machine, is given time.
_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
}
# Else a node that starts waits for files with these numbers, no longer than a busy machine may take.
_PORTS = (
    "metrics_agent_port",
    "dashboard_agent_listen_port",
    "runtime_env_agent_port",
    "metrics_export_port",
    "dashboard_port",
)


class Nodes:
    """A head, and nodes that come and go.

    Args:
        head_cpus: CPUs that the head offers; by default it only coordinates.
        redis: where the head keeps what it knows, such as `127.0.0.1:6379`; by default it forgets.

    Attributes:
        address: for RAY_ADDRESS.
    """

    def __init__(self, head_cpus: int = 0, redis: str | None = None) -> None:
        self._cluster = Cluster()
        self._head: dict[str, Any] = {"include_dashboard": True, "num_cpus": head_cpus}
        self._head |= {"_system_config": _SOON, "gcs_server_port": _free_port(HEAD)}
        if redis is not None:
            self._head["external_addresses"] = [redis, redis]
        _patiently(self._cluster, HEAD, **self._head)
        self._free, self._killed = list(_OTHERS), list[Node]()
        self.address = self._cluster.address

    def add(self, **resources: float) -> Node:
        """Starts a node.

        Args:
            resources: as of `ray start`: `num_cpus` and others.
        """
        return _patiently(self._cluster, self._free.pop(0), **resources)

    def kill(self, node: Node) -> None:
        """SIGKILL to all of a node's processes: raylet, agents and workers, as by the loss of its power."""
        family = _family(node)
        for process in family:
            process.suspend()  # else a worker that sees its raylet die may still say so
        for process in family:
            process.kill()
        psutil.wait_procs(family)
        self._killed.append(node)

    def kill_head(self) -> None:
        """As `kill`, of the head: what it knows is in Redis."""
        self.kill(self._cluster.head_node)

    def restart_head(self) -> None:
        """Starts a head where the one was that was killed."""
        self._cluster.head_node = None
        _patiently(self._cluster, HEAD, **self._head)

    def processes(self) -> list[psutil.Process]:
        """Raylets, agents and workers of all nodes that live."""
        nodes = self._cluster.list_all_nodes()
        return [process for node in nodes if node not in self._killed for process in _family(node)]

    def shutdown(self) -> None:
        """Ends all of it."""
        self._cluster.shutdown()


@contextmanager
def cluster(head_cpus: int = 0, redis: str | None = None) -> Iterator[Nodes]:
    """A cluster that lasts as long as the block; see `Nodes`."""
    nodes = Nodes(head_cpus, redis)
    try:
        yield nodes
    finally:
        nodes.shutdown()


def _family(node: Node) -> list[psutil.Process]:
    own = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    return own + [child for process in own for child in process.children(recursive=True)]


def _patiently(cluster: Cluster, address: str, **arguments: Any) -> Node:
    """Starts a node; on a busy machine Ray's 30 s may be over before it is there."""
    for _ in range(3):
        others = psutil.Process().children(recursive=True)
        with suppress(Exception):
            return cluster.add_node(**_addressed(address), **arguments)
        # What has been started lives on, and holds its ports.
        started = [child for child in psutil.Process().children(recursive=True) if child not in others]
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started)
    return cluster.add_node(**_addressed(address), **arguments)


def _addressed(address: str) -> dict[str, Any]:
    """Arguments of a node at an address, with ports of its own."""
    ports = {name: _free_port(address) for name in _PORTS}
    return {"node_ip_address": address, "object_store_memory": 200_000_000, **ports}


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
