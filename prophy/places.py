"""Places for files: a folder on a disk is a `Path`, one in S3 an `S3Path`, and both are used alike.

A file appears there whole or not at all. What `Path` has no method for, or not one that is quick in S3, is a
function of this module.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock

from prophy.errors import ProPhyError
from prophy.stores import asking, is_in_s3, mendable, open_store

_CHANGES_AT_ONCE = 20
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp")
_PAUSES_S = (0.1, 0.2, 0.4, 0.8)  # while a conditional PUT of another process is under way


@dataclass(frozen=True)
class S3Path:
    """A file or a folder in S3, with methods of `Path`. A file is one object, and written by one PUT.

    A folder is there while an object is below it. Nothing is kept of what S3 answers.

    Attributes:
        url: such as `s3://bucket/cache`.
        setting: the key of the configuration that names the place.

    Raises:
        ProPhyError: from any method, where S3 refuses or does not answer, or s3fs is not installed.
    """

    url: str
    setting: str = field(compare=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "S3Path":
        return S3Path(f"{self.url}/{name}", self.setting)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "S3Path":
        """The folder that this lies in."""
        return S3Path(self.url.rpartition("/")[0], self.setting)

    def mkdir(self, parents: bool, exist_ok: bool) -> None:
        """Nothing: a folder comes with its first file."""

    def exists(self) -> bool:
        """Whether it is a file."""
        return self.etag() is not None

    is_file = exists

    def is_dir(self) -> bool:
        """Whether a file lies below it."""
        with self._using():
            return self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)["KeyCount"] > 0

    def etag(self) -> str | None:
        """What S3 calls this version of the file; None where there is none."""
        with self._using():
            try:
                return self._call("head_object", Key=self._key)["ETag"]
            except FileNotFoundError:
                return None

    def read_bytes(self) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self._using():
            try:
                return self._store.cat_file(self.url, max_concurrency=1)  # parts might be of two versions
            except FileNotFoundError:
                pass
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)

    def put(self, content: bytes, **condition: str) -> str | None:
        """Writes the file, also in the place of another.

        Args:
            content: all of it.
            condition: `IfNoneMatch="*"`, where no file may be there; or `IfMatch`, the `etag` of that which
                must be there.

        Returns:
            Its `etag`; None where the condition does not hold.
        """
        with self._using():
            for pause_s in _PAUSES_S:
                try:
                    return self._put_once(content, condition)
                except OSError as error:
                    if _code(error) != "ConditionalRequestConflict":  # which says nothing of the condition
                        raise
                time.sleep(pause_s)
            return self._put_once(content, condition)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file. S3 does not say whether there was one: `missing_ok` changes nothing."""
        with self._using():
            self._call("delete_object", Key=self._key)

    def rename(self, name: str) -> None:
        """Copies the file beside itself, then removes it: killed in between, both are there."""
        with self._using():
            self._store.cp_file(self.url, f"{self.parent}/{name}")
        self.unlink()

    def listing(self) -> list[dict[str, Any]]:
        """What fsspec says of each file and folder in it."""
        with self._using():
            try:
                return self._store.ls(self.url, detail=True)
            except FileNotFoundError:
                return []

    def remove_all(self) -> None:
        """Removes every file below it."""
        with self._using():
            while found := self._call("list_objects_v2", Prefix=self._prefix).get("Contents"):
                objects = [{"Key": about["Key"]} for about in found]
                answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
                for refusal in answer.get("Errors", []):
                    raise OSError(f"{refusal['Key']} cannot be removed: {refusal['Code']}")

    @property
    def _store(self) -> Any:
        # For each thread and process fsspec has one of its own.
        return open_store(self.url, use_listings_cache=False)[0]

    @property
    def _key(self) -> str:
        return self.url.removeprefix("s3://").partition("/")[2]

    @property
    def _prefix(self) -> str:
        """What the keys of all files below it begin with."""
        return f"{self._key}/".removeprefix("/")

    def _call(self, method: str, **arguments: Any) -> Any:
        bucket = self.url.removeprefix("s3://").partition("/")[0]
        return self._store.call_s3(method, Bucket=bucket, **arguments)

    def _put_once(self, content: bytes, condition: dict[str, str]) -> str | None:
        try:
            return self._call("put_object", Key=self._key, Body=content, **condition)["ETag"]
        except OSError as error:
            if _code(error) != "PreconditionFailed":
                raise
        return None

    @contextmanager
    def _using(self) -> Iterator[None]:
        with mendable(f"{self.setting}: cannot use {self}"), asking("it"):
            yield


@dataclass(frozen=True)
class _Fetched(S3Path):
    """A file with its content, which is not read from S3 again."""

    content: bytes = field(compare=False)

    def read_bytes(self) -> bytes:
        return self.content


Place: TypeAlias = Path | S3Path


def place_of(location: str, setting: str) -> Place:
    """The place at a path or URL that a key of the configuration names."""
    return S3Path(location.rstrip("/"), setting) if is_in_s3(location) else Path(location)


def names(folder: Place) -> list[str]:
    """The names of the files in a folder, and on a disk those of its folders too; none where it is not."""
    if isinstance(folder, S3Path):
        return list(sizes(folder))
    return os.listdir(folder) if folder.is_dir() else []


def sizes(folder: Place) -> dict[str, int]:
    """The bytes of each file in a folder, by name; none where it is not there."""
    if isinstance(folder, S3Path):
        found = (about for about in folder.listing() if about["type"] == "file")
        return {about["name"].rpartition("/")[2]: about["size"] for about in found}
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def folders(folder: Place) -> list[Place]:
    """The folders in a folder, by name; none where it is not there."""
    if isinstance(folder, S3Path):
        found = (about["name"] for about in folder.listing() if about["type"] == "directory")
        return [folder / name.rpartition("/")[2] for name in sorted(found)]
    return [place for place in sorted(folder.glob("*")) if place.is_dir()]


def fetched(path: Place) -> Place:
    """A file that is to be read several times: of one in S3, the content is asked for once, now.

    Raises:
        FileNotFoundError: there is no such file in S3.
    """
    return _Fetched(path.url, path.setting, path.read_bytes()) if isinstance(path, S3Path) else path


def sha256(path: Place) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(path, S3Path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Place, content: bytes) -> None:
    """Writes a file that appears whole or not at all, also in the place of another.

    Raises:
        OSError: the disk is full, or has no such folder.
    """
    if isinstance(path, S3Path):
        path.put(content)
        return
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_temporaries(folder: Place) -> None:
    """Removes what a killed process left of files that it was writing in a folder, and in those below.

    Raises:
        OSError: the disk does not let it be removed.
    """
    if isinstance(folder, Path):
        for leftover in folder.rglob(".*.tmp"):
            if _TEMPORARY_NAME.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)  # a process that is at work yet removes its own


def append(path: Place, content: bytes) -> None:
    """Writes to the end of a file, which is made where there is none; by one process at a time."""
    if isinstance(path, S3Path):
        path.put((path.read_bytes() if path.exists() else b"") + content)
        return
    with path.open("ab") as file:
        file.write(content)


def change(path: Place, edit: Callable[[bytes], bytes]) -> None:
    """Replaces the content of a file, or of none, by what `edit` makes of it.

    Where another process does likewise at the same time, no change is lost: on a disk it waits for a lock,
    and in S3 the file is only replaced if it is still what `edit` was given, else `edit` is called anew.

    Raises:
        OSError: see `write_whole`.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            write_whole(path, edit(path.read_bytes() if path.exists() else b""))
        return
    for _ in range(_CHANGES_AT_ONCE):
        # The version first: if the content is newer, the PUT is refused.
        if etag := path.etag():
            condition, before = {"IfMatch": etag}, path.read_bytes()
        else:
            condition, before = {"IfNoneMatch": "*"}, b""
        if path.put(edit(before), **condition):
            return
    raise ProPhyError(
        f"others changed {path} {_CHANGES_AT_ONCE} times before this command could; run it again"
    )


def rename(path: Place, name: str) -> None:
    """Gives a file another name in its folder.

    Raises:
        OSError: the disk does not let it.
    """
    if isinstance(path, S3Path):
        path.rename(name)
    else:
        path.rename(path.with_name(name))


def remove_all(folder: Place) -> None:
    """Removes a folder with all that it holds; what cannot be removed from a disk stays."""
    if isinstance(folder, S3Path):
        folder.remove_all()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _code(error: OSError) -> str | None:
    """What S3 calls the error that s3fs made this one of."""
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code")
