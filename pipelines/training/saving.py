"""How the ranks write a checkpoint together: each what it holds, then one a manifest, which commits it.

It does not know DeepSpeed or Ray.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipelines.layout import CHECKPOINTS, checkpoint_name, step_of
from pipelines.training.checkpoint import (
    MANIFEST,
    VERSION,
    Checkpoint,
    committed,
    pinned,
    set_damaged_aside,
    size_and_sha256,
)
from prophy.errors import ProPhyError


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
        root: folder of all checkpoints of the run.
        step: number of steps taken.
        fragments: what this rank holds; those of all ranks together make up every parameter, without overlap.
        shapes: each trained parameter's, by name.
        run: what is to be known about the run, as JSON.

    Raises:
        EveryRankError: the folder cannot be made; the checkpoints before are untouched.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        fragments: Iterable[Fragment],
        shapes: Mapping[str, torch.Size],
        run: Mapping[str, Any],
    ) -> None:
        self._root, self._folder = root, root / checkpoint_name(step)
        self._what = f"save the checkpoint of step {step}"
        self._manifest = {"version": VERSION, "step": step, "run": dict(run)}
        self._manifest["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        with writing(self._what):
            if dist.get_rank() == 0:
                _make_empty(self._folder)
        file = self._folder / f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        tensors = {
            f"{kind}|{fragment.start}|{fragment.name}": value.detach().to("cpu", copy=True).contiguous()
            for fragment in fragments
            for kind, value in fragment.tensors.items()
        }
        pool = ThreadPoolExecutor(1, "save")  # writing and hashing leave the interpreter free
        self._file = pool.submit(_write, file, tensors)
        pool.shutdown(wait=False)

    @property
    def is_written(self) -> bool:
        """Whether this rank's part lies on the disk, or failed to."""
        return self._file.done()

    def commit(self, num_to_keep: int) -> None:
        """Waits until every rank has written, makes it count, and removes checkpoints that are too many.

        Args:
            num_to_keep: committed checkpoints, the newest; those that are pinned stay too.

        Raises:
            EveryRankError: some rank cannot write; the checkpoints before are untouched.
        """
        with writing(self._what):
            own = self._file.result()
        files: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(files, own)
        with writing(self._what):
            if dist.get_rank() == 0:
                _commit(self._folder, self._manifest | {"files": dict(files)})
                kept = set(pinned(self._root).values())
                for old in [old for old in committed(self._root)[num_to_keep:] if step_of(old) not in kept]:
                    (old / MANIFEST).unlink()  # first: what is half removed is no checkpoint
                    shutil.rmtree(old, ignore_errors=True)  # somebody may be reading it


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
    except (OSError, SafetensorError) as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failure = next(filter(None, failures), None)
    if failure is not None:
        raise EveryRankError(
            f"cannot {what}: {failure}; make room, and run the same command again to go on from the last "
            f"checkpoint"
        )


def latest_on_every_rank(root: Path, sound: Path | None = None) -> Checkpoint | None:
    """As `latest`; rank 0 checks the files for all, and sets damaged ones aside. A collective.

    Args:
        root: folder of all checkpoints of the run.
        sound: see `set_damaged_aside`.

    Raises:
        EveryRankError: a damaged one cannot be set aside.
    """
    found: list[Checkpoint | None] = [None]
    with writing("set damaged checkpoints aside"):
        if dist.get_rank() == 0:
            found = [set_damaged_aside(root, sound)]
    dist.broadcast_object_list(found)
    return found[0]


def _make_empty(folder: Path) -> None:
    for other in folder.parent.glob(CHECKPOINTS):
        if other == folder or not (other / MANIFEST).exists():  # of a save, or a removal, that was killed
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Name, size and hash of what a rank wrote."""
    save_file(tensors, file)
    return file.name, size_and_sha256(file)


def _commit(folder: Path, manifest: dict[str, Any]) -> None:
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as content:
        json.dump(manifest, content, indent=1)
        content.flush()
        os.fsync(content.fileno())
    partial.rename(folder / MANIFEST)
    for place in (folder, folder.parent):  # their entries too, before older checkpoints go
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
