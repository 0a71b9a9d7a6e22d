"""Checkpoints of training: each rank writes what it holds, and a manifest that is written last commits them.

A folder `step-00000500` holds one safetensors file per rank, with flat fragments of trained parameters and
of what the optimiser keeps of them, and `manifest.json`: sizes and sha256 of the files, shapes, the step.
Without a manifest that fits its files a folder is no checkpoint. Fragments say where in their parameter they
lie, so any number of ranks, with any ZeRO stage, reads what any other wrote. It does not know DeepSpeed or
Ray.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipelines.layout import CHECKPOINTS, checkpoint_name, step_of
from prophy.errors import ProPhyError

MANIFEST = "manifest.json"
PINS = "pinned.json"
_VERSION = 1

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


class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: where it lies.
        step: number of steps that were taken before it.
        shapes: each trained parameter's, by name.
        run: what `save` was given about the run.

    Raises:
        ProPhyError: another version of this format.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != _VERSION:
            raise ProPhyError(
                f"{folder} was written by another version of prophy-ray; train in another run_dir"
            )
        self.folder = folder
        self.step: int = manifest["step"]
        self.shapes = {name: torch.Size(shape) for name, shape in manifest["shapes"].items()}
        self.run: dict[str, Any] = manifest["run"]
        self._files: list[str] = list(manifest["files"])

    @property
    def kinds(self) -> set[str]:
        """Kinds of tensors that it holds of every parameter."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` of a flattened parameter (or of what belongs to it), float32.

        Raises:
            ProPhyError: the checkpoint does not hold all of them.
        """
        stop = self.shapes[name].numel() if stop is None else stop
        values, filled = torch.empty(stop - start), 0
        for first, length, file, key in self._pieces.get((kind, name), []):
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                with safe_open(self.folder / file, "pt") as tensors:
                    values[low - start : high - start] = tensors.get_slice(key)[low - first : high - first]
                filled += high - low
        if filled != stop - start:
            raise ProPhyError(f"{self.folder} lacks {kind} of {name}; it is of another kind of run")
        return values

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """The whole of it, in its shape."""
        return self.read(kind, name).view(self.shapes[name])

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list[tuple[int, int, str, str]]]:
        """Start, length, file and key of every fragment, by kind and parameter."""
        pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in self._files:
            with safe_open(self.folder / file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dictionary
                    kind, start, name = key.split("|")
                    length = tensors.get_slice(key).get_shape()[0]
                    pieces.setdefault((kind, name), []).append((int(start), length, file, key))
        return pieces


def save(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    shapes: Mapping[str, torch.Size],
    run: Mapping[str, Any],
    num_to_keep: int,
) -> None:
    """Writes a checkpoint into a folder of `root`, then removes those that are too many; a collective.

    Args:
        root: folder of all checkpoints of the run.
        step: number of steps taken.
        fragments: what this rank holds; those of all ranks together make up every parameter, without overlap.
        shapes: each trained parameter's, by name.
        run: what is to be known about the run, as JSON.
        num_to_keep: committed checkpoints, the newest; those that are pinned stay too.

    Raises:
        EveryRankError: some rank cannot write; the checkpoints before are untouched.
    """
    folder = _folder(root, step)
    file = folder / f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"

    what, is_first = f"save the checkpoint of step {step}", dist.get_rank() == 0
    with writing(what):
        if is_first:
            _make_empty(folder)
    with writing(what):
        tensors = {
            f"{kind}|{fragment.start}|{fragment.name}": value.detach().cpu().contiguous()
            for fragment in fragments
            for kind, value in fragment.tensors.items()
        }
        save_file(tensors, file)
        own = file.name, _describe(file)
    files: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(files, own)
    with writing(what):
        if is_first:
            manifest = {"version": _VERSION, "step": step, "files": dict(files), "run": dict(run)}
            manifest["shapes"] = {name: list(shape) for name, shape in shapes.items()}
            _commit(folder, manifest)
            kept = set(pinned(root).values())
            for old in [old for old in committed(root)[num_to_keep:] if step_of(old) not in kept]:
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


def committed(root: Path) -> list[Path]:
    """Folders with a manifest, the newest first; their files are not looked at."""
    return sorted((file.parent for file in root.glob(f"{CHECKPOINTS}/{MANIFEST}")), reverse=True)


def pin(root: Path, **steps: int | None) -> None:
    """Has `save` keep checkpoints, by the reason for it, and no others that were pinned before.

    Only for one process at a time.
    """
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{PINS}.partial"
    partial.write_text(json.dumps({reason: step for reason, step in steps.items() if step is not None}))
    partial.replace(root / PINS)


def pinned(root: Path) -> dict[str, int]:
    """Steps of the checkpoints that stay, by the reason for it."""
    file = root / PINS
    return json.loads(file.read_text()) if file.exists() else {}


def newest_run(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder of the newest checkpoint, and what `save` was given about the run; no other file is read."""
    for folder in committed(root):
        with suppress(ValueError, KeyError):  # a damaged manifest
            return folder, json.loads((folder / MANIFEST).read_text())["run"]
    return None


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; None if there is none."""
    for folder in committed(root):
        damage = _damage(folder)
        if damage is None:
            return Checkpoint(folder)
        logger.warning("%s is damaged (%s); looking for the one before", folder, damage)
    return None


def set_damaged_aside(root: Path) -> Checkpoint | None:
    """As `latest`, and gives what is damaged the ending `.damaged`: it no longer counts.

    Only for the process that writes the checkpoints: to another, one that is being removed looks damaged.
    """
    for folder in committed(root):
        damage = _damage(folder)
        if damage is None:
            return Checkpoint(folder)
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        folder.rename(aside)
        logger.warning("%s is damaged (%s); it is now %s", folder, damage, aside.name)
    return None


def find(root: Path, step: int) -> Checkpoint | None:
    """The checkpoint of `step`; None if there is none whose files are what its manifest says."""
    folder = _folder(root, step)
    return Checkpoint(folder) if folder in committed(root) and _damage(folder) is None else None


def latest_on_every_rank(root: Path) -> Checkpoint | None:
    """As `latest`; rank 0 checks the files for all, and sets damaged ones aside. A collective.

    Raises:
        EveryRankError: a damaged one cannot be set aside.
    """
    found: list[Checkpoint | None] = [None]
    with writing("set damaged checkpoints aside"):
        if dist.get_rank() == 0:
            found = [set_damaged_aside(root)]
    dist.broadcast_object_list(found)
    return found[0]


def _folder(root: Path, step: int) -> Path:
    return root / checkpoint_name(step)


def _damage(folder: Path) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, FileNotFoundError):
        return f"{MANIFEST} cannot be read"

    def check(name: str) -> str | None:
        file = folder / name
        try:
            if file.stat().st_size != files[name]["bytes"]:
                return f"{name} is cut short"
            return None if _describe(file) == files[name] else f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        return next(filter(None, pool.map(check, files)), None)


def _describe(file: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk for good."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a save that was killed left
    folder.mkdir(parents=True)


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
