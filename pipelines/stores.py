"""Disks and object stores, by fsspec. A location is a path, or a URL such as `s3://bucket/videos`."""

from collections.abc import Iterator
from contextlib import contextmanager

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
