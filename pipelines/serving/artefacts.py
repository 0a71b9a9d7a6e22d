"""The files of videos: a folder on this machine, or any location that fsspec knows."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress

from prophy.stores import asking, open_store

CHUNK_BYTES = 1 << 20


class ArtefactStore:
    """Small files, a folder of them for each job. Its methods block.

    Whatever goes wrong there is an `OSError`, and a file that is missing a `FileNotFoundError`.

    Args:
        location: a folder, or a URL of fsspec's such as `s3://bucket/videos`.

    Raises:
        ProPhyError: fsspec does not know such URLs.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._fs, self._root = open_store(location)

    def write(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Writes files of a job, which nobody reads before they are all there.

        Raises:
            OSError: they could not be written in whole.
        """
        with asking(self._location):
            self._fs.makedirs(f"{self._root}/{job_id}", exist_ok=True)
            for name, content in files.items():
                self._fs.pipe_file(self._path(job_id, name), content)

    def add(self, job_id: str, name: str, content: bytes) -> None:
        """Adds a file to a video that readers see already; it appears whole or not at all."""
        draft = f".{uuid.uuid4().hex}"
        self.write(job_id, {draft: content})
        with asking(self._location):
            self._fs.mv(self._path(job_id, draft), self._path(job_id, name))

    def read(self, job_id: str, name: str) -> bytes:
        """The content of a file."""
        with asking(self._location):
            return self._fs.cat_file(self._path(job_id, name))

    def chunks(self, job_id: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to before `end`, a piece at a time."""
        for offset in range(start, end, CHUNK_BYTES):
            with asking(self._location):
                chunk = self._fs.cat_file(
                    self._path(job_id, name), start=offset, end=min(offset + CHUNK_BYTES, end)
                )
            yield chunk

    def size(self, job_id: str, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            with asking(self._location):
                return self._fs.size(self._path(job_id, name))
        except FileNotFoundError:
            return None

    def remove(self, job_id: str) -> None:
        """Removes all files of a job, if there are any."""
        # Not `exists` first: some drivers say no where they cannot ask.
        with suppress(FileNotFoundError), asking(self._location):
            self._fs.rm(f"{self._root}/{job_id}", recursive=True)

    def _path(self, job_id: str, name: str) -> str:
        return f"{self._root}/{job_id}/{name}"
