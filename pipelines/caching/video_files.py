"""Video files on disks and in object stores, by fsspec: list them, tell versions apart, bring them here.

A location is a path or a URL such as `s3://bucket/videos`. Knows neither tables nor Ray.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from prophy.errors import ProPhyError
from prophy.video import SUFFIXES, VideoError

_MODIFIED_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")  # one per kind of store
_A_LISTING = 1000  # files that an object store lists in one request
_AT_ONCE, _PART = 32, 16  # threads that ask for single files, and how many each takes at a time
UNREADABLE = {"size": 0, "modified": 0.0}  # the version of a file that cannot be had


@dataclass
class Found:
    """What a folder or prefix holds.

    Attributes:
        sources: the videos, by name; what is reached through symbolic links comes last.
        left_out: number of files that are no videos, by kind.
        refused: why a file or folder cannot be used, a sentence each.
    """

    sources: list[dict[str, Any]]
    left_out: Counter[str]
    refused: list[str]


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


def find_files(location: str) -> Found:
    """All videos below a folder or prefix. Links to folders are followed; each folder is searched once."""
    store, path = open_store(location)
    refused: list[str] = []
    if _is_local(store):
        infos: dict[str, dict[str, Any]] = {name: {} for name in _walk(path, refused)}
    else:
        infos = dict(sorted(store.find(path, detail=True).items()))
    sources, left_out = list[dict[str, Any]](), Counter[str]()
    for name, info in infos.items():
        ending = PurePosixPath(name).suffix.lower()
        if ending not in SUFFIXES:
            left_out[ending if is_unicode(ending) and ending else "without an ending"] += 1
        elif not is_unicode(name):
            refused.append(f"{os.fsencode(name)!r} has a name that is not UTF-8; rename it")
        else:
            sources.append(_source(store, name, info))
    return Found(sources, left_out, refused)


def _walk(top: str, refused: list[str]) -> list[str]:
    """The files below a local folder, by name; those behind links to files or folders come last."""
    plain, linked = list[str](), list[str]()
    folders, links, seen = [top], list[str](), set[tuple[int, int]]()
    while folders or links:
        behind_link = not folders
        folder = links.pop(0) if behind_link else folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            refused.append(f"{folder!a} cannot be searched for videos ({error.strerror})")
            continue
        for entry in entries:
            is_linked = behind_link or entry.is_symlink()
            if os.path.isdir(entry.path):
                (links if is_linked else folders).append(entry.path)
            else:
                (linked if is_linked else plain).append(entry.path)
    return sorted(plain) + sorted(linked)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: names of files, and texts of JSON, may hold half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sources_of(locations: Sequence[str]) -> list[dict[str, Any]]:
    """This version of each file. One that cannot be had goes to quarantine when a stage opens it.

    Where a list names many files of a folder in an object store, the folder is listed, by a request for each
    thousand; otherwise each file costs a request.

    Raises:
        ProPhyError: as `open_store`.
    """
    folders = Counter(map(_folder, locations))
    listed = {
        name: source
        for folder, count in folders.items()
        if count >= _A_LISTING and "://" in folder
        for name, source in _listed(folder).items()
    }
    others = [name for name in dict.fromkeys(locations) if name not in listed]
    parts = [others[start : start + _PART] for start in range(0, len(others), _PART)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for part, sources in zip(parts, pool.map(lambda part: [*map(_source_of, part)], parts), strict=True):
            listed.update(zip(part, sources, strict=True))
    return [listed[name] for name in locations]


def _folder(location: str) -> str:
    return location.rpartition("/")[0]


def _listed(folder: str) -> dict[str, dict[str, Any]]:
    """The files of a folder by location; none where its store keeps no lists, as web servers."""
    store, path = open_store(folder)
    try:
        with asking(folder):
            infos = [info for info in store.ls(path, detail=True) if info["type"] == "file"]
            sources = [_source(store, info["name"], info) for info in infos]
    except OSError:
        return {}
    return {f"{folder}/{_name(source['uri'])}": source for source in sources}


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _source_of(location: str) -> dict[str, Any]:
    store, path = open_store(location)
    if _is_local(store):
        return _source(store, path, {})
    try:
        with asking(location):
            return _source(store, path, store.info(path))
    except OSError:
        return {"uri": location, **UNREADABLE}


def _is_local(store: AbstractFileSystem) -> bool:
    return "file" in store.protocol


def _source(store: AbstractFileSystem, name: str, info: dict[str, Any]) -> dict[str, Any]:
    if _is_local(store):
        try:
            status = os.stat(name)
        except OSError:
            return {"uri": name, **UNREADABLE}
        return {"uri": name, "size": status.st_size, "modified": status.st_mtime}
    modified = next((info[key] for key in _MODIFIED_KEYS if info.get(key)), 0.0)
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return {"uri": store.unstrip_protocol(info["name"]), "size": info["size"], "modified": modified}


def once_each(sources: list[dict[str, Any]]) -> list[int]:
    """Places of the sources that are the first with their file: of one URI, or one that links share."""
    first: dict[object, int] = {}
    alike = Counter((source["size"], source["modified"]) for source in sources)
    for place, source in enumerate(sources):
        key: object = source["uri"]
        version = source["size"], source["modified"]
        # Links share these; only then is it worth to ask for the file behind a name.
        if "://" not in source["uri"] and alike[version] > 1 and os.path.exists(source["uri"]):
            status = os.stat(source["uri"])
            key = (*version, status.st_dev, status.st_ino)
        first.setdefault(key, place)
    return sorted(first.values())


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
            if os.path.exists(uri) and not (os.path.isfile(uri) or os.path.isdir(uri)):
                raise OSError("it is no regular file")  # such as a pipe, which one would wait for
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
