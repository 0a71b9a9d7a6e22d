"""Folders on a node's disk that are there as long as a process of that node uses them."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from prophy.stores import mendable


@contextmanager
def scratch_folder(folder: Path, fill: Callable[[Path], object] = lambda _: None) -> Iterator[Path]:
    """A folder that goes when the last of the processes leaves the block that use it at the same time.

    What processes left that were killed goes when the next one uses any folder beside it.

    Args:
        folder: where.
        fill: makes its content, once, in the process that comes first; the others wait for it.

    Raises:
        ProPhyError: the disk cannot be used; or what `fill` raises.
    """
    lock, held = folder.with_name(".lock"), folder.with_name(f"{folder.name}.held")
    with mendable(f"cannot use {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            _remove_unused(folder.parent)
            holder = held.open("a+")  # NFS takes a shared lock only on what may be read
            fcntl.flock(holder, fcntl.LOCK_SH)  # which a process that is killed gives back
    try:
        with mendable(f"cannot use {folder.parent}"), FileLock(lock):
            if not folder.is_dir():
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                fill(partial)
                partial.rename(folder)
        yield folder
    finally:
        with FileLock(lock):
            holder.close()
            _remove_unused(folder.parent)


def _remove_unused(parent: Path) -> None:
    for held in parent.glob("*.held"):
        with held.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for folder in (held.with_suffix(""), held.with_suffix(".partial")):
                shutil.rmtree(folder, ignore_errors=True)
            held.unlink()
