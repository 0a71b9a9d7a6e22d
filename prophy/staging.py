"""Copies of a cache's files in S3 on a disk of this machine, in `home() / "cache"`, for all that read them.

Clips are drawn in random order, and S3 is asked for whole files. A file is named by its content, so a copy is
right for every run, and for every place that the file lies at. The least recently used go first.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.places import Place, S3Path, clear_temporaries, sizes, write_whole
from prophy.schema import ROW_FILES, DamagedFileError, reading
from prophy.stores import mendable

logger = logging.getLogger(__name__)

_ROOM_LOCK = ".room.lock"  # held where copies are written or removed


@contextmanager
def on_disk(file: Place, max_bytes: int) -> Iterator[Path]:
    """A file as it is; of one in S3 this machine's copy, which is made first where there is none.

    While the block runs the copy stays. Processes that ask at the same time fetch it once.

    Args:
        file: named by its content.
        max_bytes: what all copies may take (`cache.max_staged_bytes`), besides those that are being read.

    Raises:
        MissingFileError: it is gone.
        DamagedFileError: it does not hold what its name says.
        ProPhyError: S3 refuses or does not answer, or there is no room for the copy.
    """
    if isinstance(file, Path):
        yield file
        return
    copy = _folder() / file.name
    with _opened(file, copy, max_bytes):
        yield copy


def drop_copy(file: S3Path) -> None:
    """Removes this machine's copy of a file, which the next that asks for it makes anew."""
    folder = _folder()
    with FileLock(folder / _ROOM_LOCK):
        (folder / file.name).unlink(missing_ok=True)


def tell_staging(tables: dict[Place, list[str]], max_bytes: int) -> None:
    """Says how much of S3 is going to be copied; nothing where all is on a disk.

    Args:
        tables: the files of each that are going to be read.
        max_bytes: what all copies may take.
    """
    files = [(sizes(table), names) for table, names in tables.items() if isinstance(table, S3Path)]
    needed = sum(of_table.get(name, 0) for of_table, names in files for name in names)
    if needed:
        logger.info(
            "%d files of the cache, %.2f GB, are copied from S3 to %s of each node as they are read",
            sum(len(names) for _, names in files),
            needed / 1e9,
            _folder(),
        )
    if needed > max_bytes:
        logger.warning(
            "cache.max_staged_bytes (%.2f GB) is less than that, so files are copied again and again; raise "
            "it where the disk has room",
            max_bytes / 1e9,
        )
    elif needed > (room := _room()):
        logger.warning(
            "the disk of this machine has room for %.2f GB of that, so files are copied again and again; set "
            "PROPHY_HOME to a folder of a larger one",
            room / 1e9,
        )


def _room() -> int:
    """What copies take or may take on the disk, in bytes."""
    folder = _folder()
    with mendable(f"cannot keep copies in {folder} (PROPHY_HOME)"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _ROOM_LOCK):
            taken = sum(status.st_size for status in _copies(folder).values())
            return taken + shutil.disk_usage(folder).free


def _folder() -> Path:
    return home() / "cache"


def _opened(file: S3Path, copy: Path, max_bytes: int) -> BinaryIO:
    """The copy, marked as read just now, with a lock that keeps it while it is open."""
    with mendable(
        f"cannot keep copies in {copy.parent} (PROPHY_HOME; cache.max_staged_bytes is {max_bytes})"
    ):
        copy.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileNotFoundError):
                opened = copy.open("rb")
                fcntl.flock(opened, fcntl.LOCK_SH)
                if os.fstat(opened.fileno()).st_nlink:  # else it was removed before it was locked
                    now = time.time_ns()  # the system's own clock stands still for milliseconds
                    os.utime(copy, ns=(now, now))
                    return opened
                opened.close()
            _fetch(file, copy, max_bytes)


def _fetch(file: S3Path, copy: Path, max_bytes: int) -> None:
    folder = copy.parent
    # A lock for some of the files: those of all would stay for ever.
    with FileLock(folder / f".{copy.name[:2]}.lock"):
        if copy.exists():
            return
        with reading(file):
            content = file.read_bytes()
        if not copy.name.startswith(hashlib.sha256(content).hexdigest()):
            raise DamagedFileError(file, "holds other bytes than its name says")
        if len(content) > max_bytes:
            raise ProPhyError(
                f"{file} takes {len(content)} bytes, and cache.max_staged_bytes is {max_bytes}; raise it"
            )
        with FileLock(folder / _ROOM_LOCK):
            clear_temporaries(folder)  # all are written with this lock
            _make_room(folder, len(content), max_bytes)
            write_whole(copy, content)


def _copies(folder: Path) -> dict[Path, os.stat_result]:
    return {copy: copy.stat() for copy in folder.glob(ROW_FILES)}


def _make_room(folder: Path, num_bytes: int, max_bytes: int) -> None:
    """Removes copies, the least recently used first, until another fits in, and on the disk."""
    found = _copies(folder)
    taken = sum(status.st_size for status in found.values())
    for copy, status in sorted(found.items(), key=lambda each: each[1].st_mtime_ns):
        if taken + num_bytes <= max_bytes and num_bytes <= shutil.disk_usage(folder).free:
            return
        with copy.open("r+b") as opened, suppress(BlockingIOError):  # then it is being read
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copy.unlink()
            taken -= status.st_size
