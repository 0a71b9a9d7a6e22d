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
from pathlib import Path
from typing import Any

from filelock import FileLock

from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.models.description import DESCRIPTION
from prophy.stores import asking, files_below, mendable, open_store

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 8  # one stream each, which goes on where it was cut


def is_in_s3(location: str) -> bool:
    """Whether it is the URL of a place in S3."""
    return location.startswith("s3://")


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
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _download(url, files, folder)
    return folder


def _version(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """What lies at a URL, in 16 hexadecimal digits."""
    listed = sorted((name, about["size"], about["ETag"]) for name, about in files.items())
    return hashlib.sha256(json.dumps([url, listed]).encode()).hexdigest()[:16]


def _download(url: str, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    needed, free = sum(about["size"] for about in files.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ProPhyError(
            f"{url} takes {needed / 1e9:.2f} GB in {folder.parent}, and {free / 1e9:.2f} GB are free; remove "
            "copies that nobody uses, or set PROPHY_HOME to a folder of another disk"
        )
    logger.info("%d files, %.2f GB, are copied from %s to %s", len(files), needed / 1e9, url, folder)
    store, root = open_store(url)
    copies = {name: partial / name for name in files}
    for name, copy in copies.items():
        if ".." in copy.parts or not copy.is_relative_to(partial):
            raise ProPhyError(f"{url} has a file called {name!r}, which is no name in a folder; remove it")
    try:
        with mendable(f"cannot use {url}"), asking("it"):
            store.get(
                [f"{root}/{name}" for name in files],
                [str(copy) for copy in copies.values()],
                batch_size=_FILES_AT_ONCE,
                max_concurrency=1,
            )
            after = files_below(url)
        cut = any(copy.stat().st_size != files[name]["size"] for name, copy in copies.items())
        if cut or _version(url, after) != _version(url, files):
            raise ProPhyError(f"{url} has changed while it was copied; run the same command again")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
