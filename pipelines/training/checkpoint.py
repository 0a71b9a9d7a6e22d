"""A checkpoint of training as it lies on a disk: what its files hold, and whether they are whole.

A folder `step-00000500` holds one safetensors file per rank, with flat fragments of trained parameters and
of what the optimiser keeps of them, and `manifest.json`: sizes and sha256 of the files, shapes, the step.
Without a manifest that fits its files a folder is no checkpoint. Fragments say where in their parameter they
lie, so any number of ranks, with any ZeRO stage, reads what any other wrote (`saving.py`).
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from prophy.errors import ProPhyError

if TYPE_CHECKING:  # the driver, which reads no tensors, needs no torch, which takes seconds to import
    import torch

MANIFEST = "manifest.json"
VERSION = 1


class DamagedError(ProPhyError):
    """The files of a checkpoint are not what its manifest says.

    Args:
        place: where the checkpoint lies.
        damage: which file, and what is wrong with it.
    """

    def __init__(self, place: str, damage: str) -> None:
        super().__init__(f"{place} is damaged ({damage})")


class Checkpoint:
    """A committed checkpoint.

    Args:
        folder: where its files are read.
        place: where it lies: the same folder, or what that is a copy of.

    Attributes:
        place: as it was given.
        step: number of steps that were taken before it.
        shapes: each trained parameter's, by name.
        run: what `save` was given about the run.
        fingerprint: sha256 of its manifest, and with it of all that it holds.

    Raises:
        ProPhyError: another version of this format.
    """

    def __init__(self, folder: Path, place: str) -> None:
        content = (folder / MANIFEST).read_bytes()
        manifest, self.fingerprint = json.loads(content), hashlib.sha256(content).hexdigest()
        if manifest["version"] != VERSION:
            raise ProPhyError(
                f"{place} was written by another version of prophy-ray; train in another run_dir"
            )
        self.place = place
        self._folder = folder
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
                with safe_open(self._folder / file, "pt") as tensors:
                    values[low - start : high - start] = tensors.get_slice(key)[low - first : high - first]
                filled += high - low
        if filled != stop - start:
            raise ProPhyError(f"{self.place} lacks {kind} of {name}; it is of another kind of run")
        return values

    def tensor(self, kind: str, name: str) -> "torch.Tensor":
        """The whole of it, in its shape."""
        return self.read(kind, name).view(self.shapes[name])

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list[tuple[int, int, str, str]]]:
        """Start, length, file and key of every fragment, by kind and parameter."""
        pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in self._files:
            with safe_open(self._folder / file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dictionary
                    kind, start, name = key.split("|")
                    length = tensors.get_slice(key).get_shape()[0]
                    pieces.setdefault((kind, name), []).append((int(start), length, file, key))
        return pieces


def damage_of(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which of the files in a folder is not what a manifest says of it, and how; None if all are."""

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
