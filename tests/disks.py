"""A disk that is full for real."""

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

_FLOCK = fcntl.flock


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mounts an empty disk of this size at `folder`; skips the test where nothing can be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("only root can mount a disk that is small")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def lock_as_nfs_does(file: IO[bytes] | IO[str], kind: int) -> None:
    """`fcntl.flock` of NFS: a shared lock is for what may be read, an exclusive one for what may be written.

    Raises:
        OSError: the file is open for something else.
    """
    opened_for = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if opened_for not in (os.O_RDWR, os.O_RDONLY if kind & fcntl.LOCK_SH else os.O_WRONLY):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _FLOCK(file, kind)


def remount(disk: Path, options: str) -> None:
    """Mounts it again with other options of `mount`, such as another size; what it holds stays."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)
