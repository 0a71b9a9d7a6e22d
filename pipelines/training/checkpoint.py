"""Checkpoints of training as they lie on the disk: found, checked, read and kept.

A folder `step-00000500` holds one safetensors file per rank, with flat fragments of trained parameters and
of what the optimiser keeps of them, and `manifest.json`: sizes and sha256 of the files, shapes, the step.
Without a manifest that fits its files a folder is no checkpoint. Fragments say where in their parameter they
lie, so any number of ranks, with any ZeRO stage, reads what any other wrote (`saving.py`).
"""

import hashlib
import json
import logging
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pipelines.layout import CHECKPOINTS, checkpoint_name
from prophy.errors import ProPhyError

if TYPE_CHECKING:  # the driver, which reads no tensors, needs no torch, which takes seconds to import
    import torch

MANIFEST = "manifest.json"
PINS = "pinned.json"
VERSION = 1

logger = logging.getLogger(__name__)


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
        if manifest["version"] != VERSION:
            raise ProPhyError(
                f"{folder} was written by another version of prophy-ray; train in another run_dir"
            )
        self.folder = folder
        self.step: int = manifest["step"]
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in manifest["shapes"].items()
        }
        self.run: dict[str, Any] = manifest["run"]
        self._files: list[str] = list(manifest["files"])

    @property
    def kinds(self) -> set[str]:
        """Kinds of tensors that it holds of every parameter."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Elements `start` to `stop` of a flattened parameter (or of what belongs to it), float32.

        Raises:
            ProPhyError: the checkpoint does not hold all of them.
        """
        import torch

        stop = math.prod(self.shapes[name]) if stop is None else stop
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

    def tensor(self, kind: str, name: str) -> "torch.Tensor":
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


def set_damaged_aside(root: Path, sound: Path | None = None) -> Checkpoint | None:
    """As `latest`, and gives what is damaged the ending `.damaged`: it no longer counts.

    Only for the process that writes the checkpoints: to another, one that is being removed looks damaged.

    Args:
        root: folder of all checkpoints of the run.
        sound: one that was looked at a moment ago: tens of gigabytes are not hashed twice.
    """
    for folder in committed(root):
        damage = None if folder == sound else _damage(folder)
        if damage is None:
            return Checkpoint(folder)
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)  # left by an earlier run
        folder.rename(aside)
        logger.warning("%s is damaged (%s); it is now %s", folder, damage, aside.name)
    return None


def find(root: Path, step: int) -> Checkpoint | None:
    """The checkpoint of `step`; None if there is none whose files are what its manifest says."""
    folder = root / checkpoint_name(step)
    return Checkpoint(folder) if folder in committed(root) and _damage(folder) is None else None


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
            return None if size_and_sha256(file) == files[name] else f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        return next(filter(None, pool.map(check, files)), None)


def size_and_sha256(file: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk for good."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
