"""The places where checkpoints of training may lie: a folder that all nodes see, and S3."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config import read_saved
from pipelines.layout import CHECKPOINTS, RunFolder, checkpoint_name, step_of
from pipelines.training.checkpoint import MANIFEST, Checkpoint, DamagedError, damage_of, size_and_sha256
from pipelines.training.checkpoint_store import CheckpointStore
from pipelines.training.scratch import scratch_folder
from prophy.hashing import home
from prophy.stores import asking, check_room, download, files_below, is_in_s3, mendable, open_store

_STREAMS = 4  # at once, to send a file; each holds 50 MB of it in memory

logger = logging.getLogger(__name__)


def open_checkpoints(location: str) -> CheckpointStore:
    """The checkpoints at a folder, or at a URL of S3.

    Raises:
        ProPhyError: s3fs is not installed.
    """
    return S3Store(location) if is_in_s3(location) else FolderStore(location)


def checkpoints_of(run_dir: Path) -> CheckpointStore:
    """The checkpoints of the run in a folder, wherever its last `prophy train` wrote them.

    Raises:
        ProPhyError: the folder's train.yaml is not what `prophy train` writes.
    """
    saved = RunFolder(run_dir).config("train")
    train = read_saved(saved, "train", ["train"])["train"] if saved.exists() else {}
    return open_checkpoints(train.get("checkpoints") or str(RunFolder(run_dir).checkpoints))


class FolderStore(CheckpointStore):
    """Checkpoints in a folder that all nodes see. Its methods raise `OSError` where it cannot be used."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._root = Path(location)

    def committed(self) -> list[int]:
        """See `CheckpointStore`."""
        manifests = self._root.glob(f"{CHECKPOINTS}/{MANIFEST}")
        return sorted((step_of(file.parent.name) for file in manifests), reverse=True)

    def check(self, step: int) -> None:
        """See `CheckpointStore`."""
        damage = damage_of(self._folder(step), self.manifest(step, "files"))
        if damage is not None:
            raise DamagedError(self.place(step), damage)

    @contextmanager
    def open(self, step: int) -> Iterator[Checkpoint]:
        """See `CheckpointStore`."""
        yield Checkpoint(self._folder(step), self.place(step))

    def begin(self, step: int) -> None:
        """See `CheckpointStore`."""
        folder = self._folder(step)
        for other in self._root.glob(CHECKPOINTS):
            if other == folder or not (other / MANIFEST).exists():  # of a save, or a removal, that was killed
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True)

    def put(self, step: int, name: str, num_bytes: int, write: Callable[[Path], object]) -> dict[str, Any]:
        """See `CheckpointStore`."""
        file = self._folder(step) / name
        write(file)
        return size_and_sha256(file)

    def commit(self, step: int, manifest: Mapping[str, Any]) -> None:
        """See `CheckpointStore`."""
        super().commit(step, manifest)
        for place in (self._folder(step), self._root):  # their entries too, before older checkpoints go
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def remove(self, step: int) -> None:
        """See `CheckpointStore`."""
        (self._folder(step) / MANIFEST).unlink()
        shutil.rmtree(self._folder(step), ignore_errors=True)  # somebody may be reading it

    def set_aside(self, step: int) -> None:
        """See `CheckpointStore`."""
        aside = self._root / f"{checkpoint_name(step)}.damaged"
        shutil.rmtree(aside, ignore_errors=True)  # left by an earlier run
        self._folder(step).rename(aside)

    def _folder(self, step: int) -> Path:
        return self._root / checkpoint_name(step)


class S3Store(CheckpointStore):
    """Checkpoints in S3. An object is there whole or not at all.

    What a rank saves lies on its node's disk until it is sent, and what is read while it is read. Methods
    raise `ProPhyError` where S3 refuses or does not answer, or the disk has no room.
    """

    look_every_s = 10.0  # each look is a request, which is paid for

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._store, self._root = open_store(location)
        self._disk = home() / "checkpoints" / hashlib.sha256(location.encode()).hexdigest()[:16]

    def committed(self) -> list[int]:
        """See `CheckpointStore`."""
        names = self._names()
        folders = [folder for folder in _checkpoints_in(names) if f"{folder}/{MANIFEST}" in names]
        return sorted(map(step_of, folders), reverse=True)

    def check(self, step: int) -> None:
        """Compares names and sizes; what else has changed shows where the files are copied."""
        expected, found = self.manifest(step, "files"), self._names()
        for name, about in expected.items():
            size = found.get(f"{checkpoint_name(step)}/{name}")
            if size != about["bytes"]:
                what = "is missing" if size is None else "is cut short"
                raise DamagedError(self.place(step), f"{name} {what}")

    @contextmanager
    def open(self, step: int) -> Iterator[Checkpoint]:
        """A copy on this node's disk, one for all processes that read it at the same time."""
        files = self.manifest(step, "files")
        version = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        folder = self._disk / "copies" / f"{checkpoint_name(step)}-{version}"
        with scratch_folder(folder, partial(self._copy, step, files)):
            yield Checkpoint(folder, self.place(step))

    def begin(self, step: int) -> None:
        """See `CheckpointStore`."""
        names = self._names()
        for folder in _checkpoints_in(names):
            if folder == checkpoint_name(step) or f"{folder}/{MANIFEST}" not in names:
                self._remove(folder)

    def put(self, step: int, name: str, num_bytes: int, write: Callable[[Path], object]) -> dict[str, Any]:
        """See `CheckpointStore`."""
        place = f"{self.place(step)}/{name}"
        with scratch_folder(self._disk / "parts" / f"{name}.{os.getpid()}") as folder:
            check_room(place, num_bytes, folder)
            file = folder / name
            write(file)
            about = size_and_sha256(file)
            with _using(place):
                self._store.put_file(
                    str(file), f"{self._root}/{checkpoint_name(step)}/{name}", max_concurrency=_STREAMS
                )
        return about

    def remove(self, step: int) -> None:
        """See `CheckpointStore`."""
        self._remove(checkpoint_name(step))

    def set_aside(self, step: int) -> None:
        """See `CheckpointStore`."""
        folder = checkpoint_name(step)
        self._remove(f"{folder}.damaged")
        for name in self._below(folder):
            with _using(f"{self.location}/{name}"):
                aside = f"{folder}.damaged/{name.removeprefix(f'{folder}/')}"
                self._store.cp_file(f"{self._root}/{name}", f"{self._root}/{aside}")
                self._store.rm_file(f"{self._root}/{name}")

    def _copy(self, step: int, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        place, num_bytes = self.place(step), sum(about["bytes"] for about in files.values())
        check_room(place, num_bytes, folder)
        logger.info("%s, %.2f GB, is copied to %s", place, num_bytes / 1e9, folder.parent)
        with _using(place):
            try:
                download(place, [MANIFEST, *files], folder)
            except FileNotFoundError:
                raise DamagedError(place, "a file of it is gone") from None
        damage = damage_of(folder, files)
        if damage is not None:
            raise DamagedError(place, damage)

    def _names(self) -> dict[str, int]:
        """Sizes of all objects, by their paths from the place."""
        with _using(self.location):
            return {name: about["size"] for name, about in files_below(self.location).items()}

    def _below(self, folder: str) -> list[str]:
        """The objects of a checkpoint, the manifest first: without it, it is none any more."""
        names = [name for name in self._names() if name.startswith(f"{folder}/")]
        return sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}"))

    def _remove(self, folder: str) -> None:
        for name in self._below(folder):
            with _using(f"{self.location}/{name}"):
                self._store.rm_file(f"{self._root}/{name}")


def _checkpoints_in(names: Mapping[str, int]) -> list[str]:
    """Folders of checkpoints, whole or not, among paths of files."""
    folders = {name.partition("/")[0] for name in names}
    return sorted(folder for folder in folders if fnmatch(folder, CHECKPOINTS))


@contextmanager
def _using(place: str) -> Iterator[None]:
    with mendable(f"train.checkpoints: cannot use {place}"), asking("it"):
        yield
