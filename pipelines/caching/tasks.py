"""Reads the files of a table as Ray tasks, on all nodes of a cluster; what is one part, without Ray.

Ray takes longer to start, and even to import, than one part takes to read: a small cache does not wait for
it. Knows no tables: `verify.py` and `tables.py` have what reads a part.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from types import TracebackType
from typing import Self

import pyarrow as pa

from pipelines.caching.parts import FILES_PER_PART, ReadPart, parts_of, read_here
from pipelines.config import Config
from prophy.schema import MissingFileError

_BEGUN = 256  # tasks at once, and results that wait for an earlier one: more readers than most disks bear
_STALLED_AFTER_S = 60.0


class FileTasks:
    """A `ReadParts` that starts Ray once a table has more than one part; Ray ends with the `with` block.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._stack, self._started = config, ExitStack(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def start_ray(self) -> None:
        """Has Ray there until the end of the block, as `ray_session`."""
        from pipelines.runtime import ray_session

        if not self._started:
            self._stack.enter_context(ray_session(self._config))
            self._started = True

    def __call__(self, title: str, read: ReadPart, names: list[str]) -> Iterable[pa.Table]:
        """Has the parts read.

        Raises:
            ProPhyError: Ray cannot be had, no node has a CPU for a task, or a part cannot be read.
        """
        if len(names) <= FILES_PER_PART:
            return read_here(title, read, names)
        from pipelines.caching.progress import show_progress

        self.start_ray()
        return show_progress(_in_order(read, names), title, len(names), "files", FILES_PER_PART)


def _in_order(read: ReadPart, names: list[str]) -> Iterator[pa.Table]:
    import ray

    from pipelines.resources import Need, room_for

    # Hashing keeps a CPU busy. By default Ray fills half a node before it uses the next, with its network.
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_read_part)
    shared, left = ray.put(read), parts_of(names)
    begun = deque(task.remote(shared, part) for part in islice(left, _BEGUN))
    while begun:
        while not ray.wait([begun[0]], timeout=_STALLED_AFTER_S)[0]:
            room_for([Need("a task that reads the cache's files", 1, 1.0)])  # else Ray waits without an end
        yield ray.get(begun.popleft())
        begun.extend(task.remote(shared, part) for part in islice(left, 1))


def _read_part(read: ReadPart, names: list[str]) -> pa.Table:
    import ray

    try:
        return read(names)
    except MissingFileError as error:
        node = ray.util.get_node_ip_address()
        raise MissingFileError(f"{error}; or does node {node} not see that folder?") from None
