"""Disks and object stores, by fsspec. A location is a path, or a URL such as `s3://bucket/videos`."""

import logging
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from prophy.errors import ProPhyError

# Where credentials were found, again in each process.
for _name in ("aiobotocore", "botocore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_FILES_AT_ONCE = 8  # one stream each, which goes on where it was cut


def is_in_s3(location: str) -> bool:
    """Whether it is the URL of a place in S3."""
    return location.startswith("s3://")


def open_store(location: str, **options: object) -> tuple[AbstractFileSystem, str]:
    """The file system of a location, and the path in it.

    Args:
        location: a path or URL.
        options: those of the driver of the URL's scheme.

    Raises:
        ProPhyError: an unknown scheme, or one whose package is not installed.
    """
    if "://" not in location:  # a path as it is: fsspec would read `::` as a chain of stores
        return fsspec.filesystem("file"), location
    try:
        if is_in_s3(location):  # where `::` may be in a key
            if "?versionId=" in location:  # a list may name a version of a video
                options = {"version_aware": True, **options}
            return fsspec.filesystem("s3", **options), location.removeprefix("s3://").rstrip("/")
        return fsspec.url_to_fs(location, **options)
    except (ImportError, ValueError) as error:
        raise ProPhyError(f"cannot open {location}: {error}") from None


@contextmanager
def asking(location: str) -> Iterator[None]:
    """Makes an `OSError` of whatever a store's driver raises: the drivers have no class of errors in common.

    Raises:
        OSError: the store does not answer, or does not let us in.
    """
    try:
        yield
    except (OSError, ProPhyError):
        raise
    except Exception as error:
        raise OSError(f"{location} cannot be had: {type(error).__name__}: {error}") from error


@contextmanager
def mendable(failure: str) -> Iterator[None]:
    """Makes a mistake of the user of an `OSError`.

    Args:
        failure: what cannot be done, such as "cannot use s3://bucket/videos".

    Raises:
        ProPhyError: says so, with the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise ProPhyError(
            f"{failure}: {error.strerror or error}; mend that, and run the same command again"
        ) from None


def files_below(location: str) -> dict[str, dict[str, Any]]:
    """What fsspec says of each file below a place, as it is now, by its path from there.

    Raises:
        OSError: the store does not answer, or does not let us in.
        ProPhyError: see `open_store`.
    """
    store, root = open_store(location)
    with asking("it"):
        found = store.find(root, detail=True, refresh=True)
    # Consoles make objects that stand for folders; and an object may be called as the place itself.
    names = {path.removeprefix(f"{root}/"): about for path, about in found.items() if path != root}
    return {name: about for name, about in names.items() if name and not name.endswith("/")}


def download(url: str, names: Collection[str], folder: Path) -> None:
    """Copies files from below a place in S3 into a folder.

    Args:
        url: the place.
        names: their paths from there.
        folder: where each gets the same path.

    Raises:
        FileNotFoundError: one of them is not there.
        OSError: S3 refuses or does not answer, or the disk cannot be written to.
        ProPhyError: a name leads out of the folder.
    """
    store, root = open_store(url)
    for name in names:
        copy = folder / name
        if ".." in copy.parts or not copy.is_relative_to(folder):
            raise ProPhyError(f"{url} has a file called {name!r}, which is no name in a folder; remove it")
    with asking("it"):
        store.get(
            [f"{root}/{name}" for name in names],
            [str(folder / name) for name in names],
            batch_size=_FILES_AT_ONCE,
            max_concurrency=1,
        )


def try_writing(location: str) -> None:
    """Writes, lists, reads and removes a small file in a folder or object store.

    Raises:
        OSError: one of them is not possible.
        ProPhyError: see `open_store`.
    """
    store, root = open_store(location)
    name = f".prophy-{secrets.token_hex(8)}"
    path = f"{root}/{name}"
    with asking("it"):
        if "://" not in location:  # an object store has no folders
            store.makedirs(root, exist_ok=True)
        store.pipe_file(path, b"ab")
        is_listed, content = name in files_below(location), store.cat_file(path)
        store.rm_file(path)
    if not is_listed or content != b"ab":
        raise OSError("what was written is not there")


def check_room(what: str, num_bytes: int, folder: Path) -> None:
    """Looks whether a folder below PROPHY_HOME has room.

    Args:
        what: what shall lie there.
        num_bytes: how much it takes.
        folder: the folder, which must be there.

    Raises:
        ProPhyError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ProPhyError(
            f"{what} takes {num_bytes / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free; make room "
            "there, or set PROPHY_HOME to a folder of another disk"
        )
