"""The files of videos: a folder on this machine, or any location that fsspec knows."""

import uuid
from collections.abc import Iterator, Mapping

import fsspec

CHUNK_BYTES = 1 << 20


class ArtefactStore:
    """Small files, a folder of them for each job. Its methods block.

    Args:
        location: a folder, or a URL of fsspec's such as `s3://bucket/videos`.
    """

    def __init__(self, location: str) -> None:
        self._fs, self._root = fsspec.url_to_fs(location)

    def write(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Writes files of a job, which nobody reads before they are all there.

        Raises:
            OSError: they could not be written in whole.
        """
        self._fs.makedirs(f"{self._root}/{job_id}", exist_ok=True)
        for name, content in files.items():
            self._fs.pipe_file(self._path(job_id, name), content)

    def add(self, job_id: str, name: str, content: bytes) -> None:
        """Adds a file to a video that readers see already; it appears whole or not at all."""
        draft = f".{uuid.uuid4().hex}"
        self.write(job_id, {draft: content})
        self._fs.mv(self._path(job_id, draft), self._path(job_id, name))

    def read(self, job_id: str, name: str) -> bytes:
        """The content of a file."""
        return self._fs.cat_file(self._path(job_id, name))

    def chunks(self, job_id: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to before `end`, a piece at a time."""
        for offset in range(start, end, CHUNK_BYTES):
            yield self._fs.cat_file(
                self._path(job_id, name), start=offset, end=min(offset + CHUNK_BYTES, end)
            )

    def size(self, job_id: str, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return self._fs.size(self._path(job_id, name))
        except FileNotFoundError:
            return None

    def remove(self, job_id: str) -> None:
        """Removes all files of a job, if there are any."""
        if self._fs.exists(f"{self._root}/{job_id}"):
            self._fs.rm(f"{self._root}/{job_id}", recursive=True)

    def _path(self, job_id: str, name: str) -> str:
        return f"{self._root}/{job_id}/{name}"
