"""How the ranks write a checkpoint together: each what it holds, then one a manifest, which commits it.

It does not know DeepSpeed or Ray.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipelines.training.checkpoint import VERSION, Checkpoint, DamagedError
from pipelines.training.checkpoint_store import CheckpointStore
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)


class EveryRankError(ProPhyError):
    """A mistake of the user that every rank raises at the same point: none is left waiting for another."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one trained parameter, as a rank holds it.

    Attributes:
        name: the parameter's.
        start: where in the flattened parameter it begins.
        tensors: by kind ("parameter", "exp_avg", "exp_avg_sq", "ema"), flat float32 views of equal length;
            what is copied into them arrives.
    """

    name: str
    start: int
    tensors: Mapping[str, torch.Tensor]


class Save:
    """A checkpoint on its way: copied when this is made, written beside the next steps, then committed.

    Making one and `commit` are collectives. One at a time: what earlier ones left unfinished is removed.

    Args:
        store: the checkpoints of the run.
        step: number of steps taken.
        fragments: what this rank holds; those of all ranks together make up every parameter, without overlap.
        shapes: each trained parameter's, by name.
        run: what is to be known about the run, as JSON.

    Raises:
        EveryRankError: the store cannot be used; the checkpoints before are untouched.
    """

    def __init__(
        self,
        store: CheckpointStore,
        step: int,
        fragments: Iterable[Fragment],
        shapes: Mapping[str, torch.Size],
        run: Mapping[str, Any],
    ) -> None:
        self._store, self._step = store, step
        self._what = f"save the checkpoint of step {step}"
        self._manifest = {"version": VERSION, "step": step, "run": dict(run)}
        self._manifest["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        with writing(self._what):
            if dist.get_rank() == 0:
                store.begin(step)
        self._name = f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        tensors = {
            f"{kind}|{fragment.start}|{fragment.name}": value.detach().to("cpu", copy=True).contiguous()
            for fragment in fragments
            for kind, value in fragment.tensors.items()
        }

        def write(file: Path) -> None:
            save_file(tensors, file)
            tensors.clear()  # to send them needs no memory

        num_bytes = sum(value.nbytes for value in tensors.values())
        pool = ThreadPoolExecutor(1, "save")  # writing and hashing leave the interpreter free
        self._file = pool.submit(store.put, step, self._name, num_bytes, write)
        pool.shutdown(wait=False)

    @property
    def is_written(self) -> bool:
        """Whether this rank's part lies in the store, or failed to."""
        return self._file.done()

    def commit(self, num_to_keep: int) -> None:
        """Waits until every rank has written, makes it count, and removes checkpoints that are too many.

        What cannot be removed stays until the next one is saved.

        Args:
            num_to_keep: committed checkpoints, the newest; those that are pinned stay too.

        Raises:
            EveryRankError: some rank cannot write; the checkpoints before are untouched.
        """
        with writing(self._what):
            own = self._name, self._file.result()
        files: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(files, own)
        with writing(self._what):
            if dist.get_rank() == 0:
                self._store.commit(self._step, self._manifest | {"files": dict(files)})
                self._remove_old(num_to_keep)

    def _remove_old(self, num_to_keep: int) -> None:
        try:
            self._store.keep(num_to_keep)
        except (ProPhyError, OSError) as error:
            logger.warning("old checkpoints stay until the next one is saved: %s", error)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A block in which a rank writes files; a collective, where it ends.

    Args:
        what: what the block does, for the message: "write the metrics".

    Raises:
        EveryRankError: some rank cannot.
    """
    failure = None
    try:
        yield
    except ProPhyError as error:
        failure = str(error)
    except (OSError, SafetensorError) as error:
        failure = f"{error}; make room, and run the same command again to go on from the last checkpoint"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failure = next(filter(None, failures), None)
    if failure is not None:
        raise EveryRankError(f"cannot {what}: {failure}")


@contextmanager
def latest_on_every_rank(store: CheckpointStore, sound: int | None = None) -> Iterator[Checkpoint | None]:
    """The newest sound checkpoint, if any, to be read within the block; begins with collectives.

    Rank 0 sets damaged ones aside.

    Args:
        store: the checkpoints of the run.
        sound: see `CheckpointStore.set_damaged_aside`.

    Raises:
        EveryRankError: a damaged one cannot be set aside, or some node cannot copy a sound one.
    """
    with ExitStack() as held:
        yield _open_latest(store, sound, held)


def _open_latest(store: CheckpointStore, sound: int | None, held: ExitStack) -> Checkpoint | None:
    while True:
        found: list[int | None] = [None]
        with writing("set damaged checkpoints aside"):
            if dist.get_rank() == 0:
                found = [store.set_damaged_aside(sound)]
        dist.broadcast_object_list(found)
        [step] = found
        if step is None:
            return None
        checkpoint, damage = None, None
        with writing(f"open the checkpoint of step {step}"):
            try:
                checkpoint = held.enter_context(store.open(step))
            except DamagedError as error:
                damage = str(error)
        damages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(damages, damage)
        damage = next(filter(None, damages), None)
        if damage is None:
            return checkpoint
        held.close()
        with writing("set damaged checkpoints aside"):
            if dist.get_rank() == 0:
                store.set_aside(step)
                logger.warning("%s, and is set aside", damage)
