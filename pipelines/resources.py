"""Whether the cluster has room for what a command starts, and what waits for room while it runs.

Ray itself waits: for nodes that may join, for an actor that cannot be placed, without an end.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import ray
from ray.data import Dataset
from ray.data._internal.cluster_autoscaler.util import is_autoscaling_enabled
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.state import list_actors

from pipelines.config import Config
from prophy.errors import ProPhyError

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

logger = logging.getLogger(__name__)

SMALL_CPUS = 0.25  # of a stage of `prophy cache` that waits for the disk more than it computes

_JOIN_WITHIN_S = 30.0  # nodes of a cluster that is being started come one after the other
_STALLED_AFTER_S = 60.0  # what can be placed is placed, and its process there, in less
_LOOK_EVERY_S = 10.0
_SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Need:
    """Actors, workers or tasks of one kind, which run at the same time.

    Attributes:
        setting: what users change to have fewer or smaller ones.
        size: how many are wanted.
        num_cpus: CPUs that each reserves.
        num_gpus: GPUs that each reserves.
        at_least: how many there must be.
    """

    setting: str
    size: int
    num_cpus: float
    num_gpus: float = 0.0
    at_least: int = 1

    def __str__(self) -> str:
        each = [f"{self.num_cpus:g} CPU", f"{self.num_gpus:g} GPU"][: 2 if self.num_gpus else 1]
        return f"{self.setting} needs {self.at_least} x {' + '.join(each)}"


Work = Literal["priors", "encodings", "train", "generate", "evaluate", "serve"]
"""A command, or a half of `prophy cache`."""


def needs_of(config: Config, work: Work) -> list[Need]:
    """What runs at the same time for some work; each reader beside a cutter and a task of the sink."""
    if work == "train":
        train, size = config.train, config.train.num_workers
        at_least = train.min_workers or size
        needs = [Need("train.num_workers", size, train.cpus_per_worker, train.gpus_per_worker, at_least)]
        if train.evaluates and train.evaluation_gpus:  # else it may wait for a CPU
            needs.append(Need("train.evaluation_gpus", 1, train.evaluation_cpus, train.evaluation_gpus))
        return needs
    if work == "serve":
        serve, at_least = config.serve, max(1, config.serve.min_replicas)
        cpus, gpus = (serve.processes_per_replica * number for number in (serve.num_cpus, serve.num_gpus))
        return [Need("serve.max_replicas", serve.max_replicas, cpus, gpus, at_least)]
    if work == "generate":
        pool = config.generate.pool
        return [Need("generate.pool", pool.size, pool.num_cpus, pool.num_gpus)]
    if work == "evaluate":
        pool = config.evaluate.pool
        return [Need("evaluate.pool", pool.size, pool.num_cpus, pool.num_gpus)]
    read = config.cache.read
    pool = config.cache.extract if work == "priors" else config.cache.encode
    setting = "cache.extract" if work == "priors" else "cache.encode"
    return [
        Need("cache.read", read.size, read.num_cpus + 2 * SMALL_CPUS, read.num_gpus),
        Need(setting, pool.size, pool.num_cpus, pool.num_gpus),
    ]


def room_for(needs: Sequence[Need]) -> list[int]:
    """How many of each kind the cluster can hold at once; says where those are fewer than wanted.

    Waits a little for nodes that join. Where an autoscaler adds nodes, all may be had.

    Raises:
        ProPhyError: there is no room for what must be there.
    """
    deadline, said = time.monotonic() + (_JOIN_WITHIN_S if os.environ.get("RAY_ADDRESS") else 0), False
    while True:
        placed, told = place(needs)
        if told and is_autoscaling_enabled():
            logger.warning("%s: waiting for its autoscaler", told)
            return [need.size for need in needs]
        if not told:
            break
        if time.monotonic() > deadline:
            more = "add nodes" if os.environ.get("RAY_ADDRESS") else "raise ray.num_cpus"
            raise ProPhyError(f"{told}, which is too little at once; {more}, or change that setting")
        if not said:
            logger.warning("%s: waiting %.0f s for nodes that join", told, _JOIN_WITHIN_S)
            said = True
        time.sleep(1)
    if is_autoscaling_enabled():
        return [need.size for need in needs]
    for need, count in zip(needs, placed, strict=True):
        if count < need.size:
            logger.warning("%s: the cluster has room for %d of %d", need.setting, count, need.size)
    return placed


def place(needs: Sequence[Need]) -> tuple[list[int], str]:
    """How many of each kind have room now, and what is said of those that must be there and have none."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placed = _place(needs, nodes)
    lacking = [str(need) for need, count in zip(needs, placed, strict=True) if count < need.at_least]
    if not lacking:
        return placed, ""
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    has = f"the cluster has {cpus:g} CPU and {gpus:g} GPU in {len(nodes)} node(s)"
    return placed, "; ".join([*lacking, has])


def _place(needs: Sequence[Need], nodes: list[dict[str, float]]) -> list[int]:
    """How many of each kind fit: what must be there first, the largest before the smaller; then in turn."""
    free = [{name: node.get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes]
    placed = [0] * len(needs)

    def place(index: int) -> bool:
        need = needs[index]
        for node in free:
            if need.num_cpus <= node["CPU"] + 1e-6 and need.num_gpus <= node["GPU"] + 1e-6:
                node["CPU"] -= need.num_cpus
                node["GPU"] -= need.num_gpus
                placed[index] += 1
                return True
        return False

    left = sorted(range(len(needs)), key=lambda index: (-needs[index].num_gpus, -needs[index].num_cpus))
    for index in left:
        for _ in range(needs[index].at_least):
            place(index)
    while left := [index for index in left if placed[index] < needs[index].size and place(index)]:
        pass
    return placed


class StalledError(ProPhyError):
    """A graph that moves no more, since something it needs has no room in the cluster."""


def guard(graph: Dataset) -> None:
    """Has a graph say what it waits for, and end with `StalledError` where it would wait for ever."""
    graph.context.custom_execution_callback_classes = [_StallGuard]


class _StallGuard(ExecutionCallback):
    """Looks at each turn of Ray Data's scheduler whether a row has moved."""

    def __init__(self) -> None:
        self._moved: list[tuple[int, int]] = []
        self._since = self._looked = self._said = time.monotonic()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Raises StalledError where nothing moves and an actor has no place, unless nodes may be added."""
        now = time.monotonic()
        metrics = [operator.metrics for operator in executor._topology or ()]
        moved = [(metric.num_inputs_received, metric.num_outputs_taken) for metric in metrics]
        if moved != self._moved:
            self._moved, self._since, self._said = moved, now, now
        if now - max(self._since + _STALLED_AFTER_S, self._looked + _LOOK_EVERY_S) < 0:
            return
        self._looked = now
        waiting = _without_place()
        names = ", ".join(f"{count} x {name}" for name, count in waiting.items())
        if waiting and not is_autoscaling_enabled():
            raise StalledError(
                f"nothing moved for {now - self._since:.0f} s, and the cluster has no room for {names}; "
                "was a node lost? The same command goes on where this one stopped"
            )
        if now - self._said > _SAY_EVERY_S:
            self._said = now
            state = f"{names} wait for room" if waiting else "everything has its place"
            logger.info("nothing moved for %.0f s (%s)", now - self._since, state)


def _without_place() -> Counter[str]:
    """This job's actors that no node has room for beside those that live; none where Ray cannot say.

    An actor that has room may take a minute to start on a busy machine: it is not meant.
    """
    context = ray.get_runtime_context()
    try:
        # Without an address, Ray refuses to choose where several instances run on this machine.
        actors = list_actors(
            address=context.gcs_address,
            filters=[("state", "!=", "DEAD")],
            detail=True,
            limit=10_000,
            raise_on_missing_output=False,
        )
    except Exception as error:  # the dashboard is busy, or was never there: no reason to end a run
        logger.warning("Ray does not say which actors wait for room: %s", " ".join(str(error).split()))
        return Counter()
    free = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    waiting = []
    for actor in actors:
        wanted = actor.required_resources or {}
        if actor.node_id in free:
            for name in wanted.keys() & free[actor.node_id].keys():
                free[actor.node_id][name] -= wanted[name]
        elif actor.job_id == context.get_job_id():
            name = actor.class_name.removeprefix("MapWorker(MapBatches(").removesuffix("))")
            waiting.append(Need(name, 1, wanted.get("CPU", 0.0), wanted.get("GPU", 0.0)))
    placed = _place(waiting, list(free.values()))
    return Counter(need.setting for need, count in zip(waiting, placed, strict=True) if not count)
