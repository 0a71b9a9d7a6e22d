"""Disks and object stores, by fsspec. A location is a path, or a URL such as `s3://bucket/videos`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from prophy.errors import ProPhyError


def open_store(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a location, and the path in it.

    Raises:
        ProPhyError: an unknown scheme, or one whose package is not installed.
    """
    if "://" not in location:  # a path as it is: fsspec would read `::` as a chain of stores
        return fsspec.filesystem("file"), location
    try:
        return fsspec.url_to_fs(location)
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
