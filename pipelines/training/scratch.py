"""Folders on a node's disk that are there as long as a process of that node uses them."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from prophy.hashing import home
from prophy.stores import mendable

_PARENTS = ("checkpoints/*/*", "exports")  # below `home()`, of all such folders
_LOCK = ".lock"  # beside them


@contextmanager
def scratch_folder(folder: Path, fill: Callable[[Path], object] = lambda _: None) -> Iterator[Path]:
    """A folder that goes when the last of the processes leaves the block that use it at the same time.

    What processes left that were killed goes when the next one uses any such folder.

    Args:
        folder: where; the one that it lies in is one of `_PARENTS`.
        fill: makes its content, once, in the process that comes first; the others wait for it.

    Raises:
        ProPhyError: the disk cannot be used; or what `fill` raises.
    """
    lock, held = folder.with_name(_LOCK), folder.with_name(f"{folder.name}.held")
    _remove_unused_elsewhere()
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


def _remove_unused_elsewhere() -> None:
    for parent in (parent for pattern in _PARENTS for parent in home().glob(pattern)):
        # Else another process is at work there, which may last, or the folder is another user's.
        with suppress(OSError), FileLock(parent / _LOCK, timeout=0):
            _remove_unused(parent)


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
