"""Video files on disks and in object stores, by fsspec: list them, tell versions apart, bring them here.

Knows neither tables nor Ray.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem

from prophy.schema import SOURCE
from prophy.stores import asking, open_store
from prophy.video import SUFFIXES, VideoError

_MODIFIED_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")  # one per kind of store
_A_LISTING = 1000  # files that an object store lists in one request
_AT_ONCE, _PART = 32, 16  # threads that ask for single files, and how many each takes at a time
_A_PART = 10_000  # rows that are dictionaries at once
_SOURCES = pa.schema([pa.field("source", SOURCE, nullable=False)])
UNREADABLE = {"size": 0, "modified": 0.0}  # the version of a file that cannot be had


@dataclass
class Found:
    """What a folder or prefix holds.

    Attributes:
        sources: a `SOURCE` of each video, by name; what is reached through symbolic links comes last.
        left_out: number of files that are no videos, by kind.
        refused: why a file or folder cannot be used, a sentence each.
    """

    sources: pa.ChunkedArray
    left_out: Counter[str]
    refused: list[str]


def find_files(location: str) -> Found:
    """All videos below a folder or prefix. Links to folders are followed; each folder is searched once."""
    store, path = open_store(location)
    refused: list[str] = []
    infos: Iterable[tuple[str, dict[str, Any]]]
    if _is_local(store):
        infos = ((name, {}) for name in _walk(path, refused))
    else:
        infos = sorted(store.find(path, detail=True).items())
    left_out = Counter[str]()

    def videos() -> Iterator[dict[str, Any]]:
        for name, info in infos:
            ending = PurePosixPath(name).suffix.lower()
            if ending not in SUFFIXES:
                left_out[ending if is_unicode(ending) and ending else "without an ending"] += 1
            elif not is_unicode(name):
                refused.append(f"{os.fsencode(name)!r} has a name that is not UTF-8; rename it")
            else:
                yield {"source": _source(store, name, info)}

    return Found(gathered(videos(), _SOURCES)["source"], left_out, refused)


def gathered(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of rows, a part of them at a time: as dictionaries they take ten times its memory."""
    rows, parts = iter(rows), [schema.empty_table()]
    while part := list(itertools.islice(rows, _A_PART)):
        parts.append(pa.Table.from_pylist(part, schema))
    return pa.concat_tables(parts)


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


def sources_of(locations: Sequence[str]) -> pa.ChunkedArray:
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

    def ask(names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"source": listed.get(name) or _source_of(name)} for name in names]

    def asked() -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(locations), _A_PART):
                names = locations[start : start + _A_PART]
                parts = [names[first : first + _PART] for first in range(0, len(names), _PART)]
                yield from itertools.chain.from_iterable(pool.map(ask, parts))

    return gathered(asked(), _SOURCES)["source"]


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


def once_each(sources: pa.ChunkedArray) -> pa.Array:
    """Places of the sources that are the first with their file: of one URI, or one that links share."""
    version = ["size", "modified"]
    rows = pa.table({name: pc.struct_field(sources, name) for name in ("uri", *version)})
    rows = rows.append_column("place", pa.array(np.arange(len(rows))))
    first = rows.group_by("uri").aggregate([("place", "min")])["place_min"]
    # Links share these; only then is it worth to ask for the file behind a name.
    local = rows.filter(pc.invert(pc.match_substring(rows["uri"], "://")))
    alike = local.group_by(version).aggregate([("place", "list"), ("place", "count")])
    alike = alike.filter(pc.greater(alike["place_count"], 1))["place_list"].combine_chunks().flatten()
    files, again = set[tuple[object, ...]](), list[int]()
    for row in rows.take(alike.sort()).to_pylist():
        if os.path.exists(row["uri"]):
            status = os.stat(row["uri"])
            file = row["size"], row["modified"], status.st_dev, status.st_ino
            if file in files:
                again.append(row["place"])
            files.add(file)
    return pa.array(np.setdiff1d(first.to_numpy(), again))


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
