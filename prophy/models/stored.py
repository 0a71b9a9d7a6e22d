"""Models that lie in S3. This machine keeps a copy of each, in `home() / "s3"`, for all that load it.

A copy is called after what lay in S3 when it was made: names, sizes and ETags of all files. What is written
there anew gets a copy of its own. Copies that nobody uses may be removed.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.models.description import DESCRIPTION
from prophy.stores import check_room, download, files_below, is_in_s3, mendable

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"


def makes_whole(name: str) -> bool:
    """Whether readers know a model by this file, which is given by its path in the model's folder.

    It is written last: where it is, the others are too.
    """
    return name in ("model_index.json", "config.json") or name.rpartition("/")[2] == DESCRIPTION


def local_folder(location: str) -> Path:
    """A folder as it is; of a place in S3 this machine's copy, which is made first where there is none.

    Processes that ask at the same time make one copy. A process looks into S3 once: it goes on with what lay
    there.

    Raises:
        ProPhyError: no whole model lies there, or another one than a moment ago; S3 refuses or does not
            answer; or this machine has no room for a copy.
    """
    return _copy_of(location.rstrip("/")) if is_in_s3(location) else Path(location)


@functools.cache
def _copy_of(url: str) -> Path:
    with mendable(f"cannot use {url}"):
        files = files_below(url)
    if not any(map(makes_whole, files)):
        raise ProPhyError(
            f"no whole model lies at {url}, which has neither model_index.json nor {DESCRIPTION}; give the "
            "place that `prophy export` wrote to its end"
        )
    folder = home() / "s3" / f"{url.rpartition('/')[2]}-{_version(url, files)}"
    with mendable(f"cannot use {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder.parent)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _download(url, files, folder)
    return folder


def _remove_unfinished(parent: Path) -> None:
    """Removes what processes that were killed left of copies of any model."""
    for partial in parent.glob(f"*{_PARTIAL}"):
        # Else a process is at work on it.
        with suppress(Timeout), FileLock(f"{partial.with_suffix('')}.lock", timeout=0):
            shutil.rmtree(partial, ignore_errors=True)


def _version(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """What lies at a URL, in 16 hexadecimal digits."""
    listed = sorted((name, about["size"], about["ETag"]) for name, about in files.items())
    return hashlib.sha256(json.dumps([url, listed]).encode()).hexdigest()[:16]


def _download(url: str, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    partial = Path(f"{folder}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed while this one waited
    needed = sum(about["size"] for about in files.values())
    check_room(url, needed, folder.parent)
    logger.info("%d files, %.2f GB, are copied from %s to %s", len(files), needed / 1e9, url, folder)
    try:
        with mendable(f"cannot use {url}"):
            download(url, files, partial)
            after = files_below(url)
        cut = any((partial / name).stat().st_size != about["size"] for name, about in files.items())
        if cut or _version(url, after) != _version(url, files):
            raise ProPhyError(f"{url} has changed while it was copied; run the same command again")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
