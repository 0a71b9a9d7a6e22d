"""Video files on disks and in object stores, by fsspec: list them, tell versions apart, bring them here.

A location is a path or a URL such as `s3://bucket/videos`. Knows neither tables nor Ray.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from prophy.errors import ProPhyError
from prophy.video import SUFFIXES, VideoError

_MODIFIED_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")  # one per kind of store
UNREADABLE = {"size": 0, "modified": 0.0}  # the version of a file that cannot be had


def open_store(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a location, and the path in it.

    Raises:
        ProPhyError: an unknown scheme, or one whose package is not installed.
    """
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
    except (OSError, ProPhyError, VideoError):
        raise
    except Exception as error:
        raise OSError(f"{location} cannot be had: {type(error).__name__}: {error}") from error


def find_files(location: str) -> list[dict[str, Any]]:
    """The sources of all videos below a folder or prefix, by name."""
    store, path = open_store(location)
    found = store.find(path, detail=True)
    return [
        _source(store, info)
        for name, info in sorted(found.items())
        if PurePosixPath(name).suffix.lower() in SUFFIXES
    ]


def source_of(location: str) -> dict[str, Any]:
    """This version of a file. One that cannot be had goes to quarantine when a stage opens it."""
    store, path = open_store(location)
    try:
        with asking(location):
            return _source(store, store.info(path))
    except OSError:
        return {"uri": location, **UNREADABLE}


def _source(store: AbstractFileSystem, info: dict[str, Any]) -> dict[str, Any]:
    uri = info["name"] if "file" in store.protocol else store.unstrip_protocol(info["name"])
    modified = next((info[key] for key in _MODIFIED_KEYS if info.get(key)), 0.0)
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return {"uri": uri, "size": info["size"], "modified": modified}


class LocalFiles:
    """Videos as local files: those on disks where they are, others copied here, one at a time.

    Args:
        max_bytes: larger files are not copied.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._folder = TemporaryDirectory(prefix="prophy-videos-")
        self._copied: str | None = None

    @contextmanager
    def open(self, uri: str) -> Iterator[str]:
        """A path to the file.

        Raises:
            OSError: it cannot be had; that says nothing about its content.
            VideoError: it is too large; or what the block raises, under the file's own name.
        """
        if "://" not in uri:
            with open(uri, "rb"):
                yield uri
            return
        path = str(Path(self._folder.name, "video"))
        if self._copied != uri:
            self._copied = None
            store, name = open_store(uri)
            with asking(uri):
                size = store.size(name)
                if size > self.max_bytes:
                    raise VideoError(
                        f"{uri} is over the limit: its size is {size} bytes, allowed are {self.max_bytes}"
                    )
                store.get_file(name, path)
            self._copied = uri
        try:
            yield path
        except VideoError as error:
            raise type(error)(str(error).replace(path, uri)) from None
