"""Where `prophy generate` writes: a folder, or a place in S3. A file appears there whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config import is_url
from prophy.errors import ProPhyError
from prophy.stores import asking, mendable, open_store

_ONE_PUT_BYTES = 5 << 30  # S3's own limit; s3fs would cut into parts, which have no conditions
_CHANGES_AT_ONCE = 20
_LOST = ("PreconditionFailed", "ConditionalRequestConflict")


class FolderOutput:
    """Files in a folder. What is being written ends in `.partial`.

    Args:
        location: the folder, which the first `change` creates.

    Raises:
        ProPhyError: from any method, where the folder cannot be used.
    """

    def __init__(self, location: str) -> None:
        self._folder = Path(location)

    def names(self) -> set[str]:
        """The names of the files that are there."""
        with _using(str(self._folder)):
            return {file.name for file in self._folder.iterdir()}

    def has(self, name: str) -> bool:
        """Whether this file is there."""
        with _using(str(self._folder)):
            return (self._folder / name).exists()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, also in the place of another."""
        path = self._folder / name
        partial = path.with_suffix(".partial")
        with _using(str(path)):
            partial.write_bytes(content)
            partial.rename(path)

    def change(self, name: str, edit: Callable[[bytes], bytes]) -> None:
        """Replaces the content of a file, or of none, by what `edit` makes of it."""
        path = self._folder / name
        with _using(str(path)):
            # Not in `write`: a node that does not see the folder must not make one of its own.
            self._folder.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
        self.write(name, edit(before))


class S3Output:
    """Objects below a prefix. Each is one PUT, so nobody sees a part of one.

    Args:
        location: such as `s3://bucket/videos`.

    Raises:
        ProPhyError: from any method, where S3 refuses or does not answer; from the start, where s3fs is not
            installed.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._store, self._root = open_store(location)

    def names(self) -> set[str]:
        """The names of the objects that are there."""
        with _using(self._location):
            try:
                found = self._store.ls(self._root, detail=False, refresh=True)
            except FileNotFoundError:  # nothing yet
                return set()
        return {path.rpartition("/")[2] for path in found}

    def has(self, name: str) -> bool:
        """Whether this object is there."""
        with _using(self._location):
            try:
                self._store.info(f"{self._root}/{name}", refresh=True)
            except FileNotFoundError:
                return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, also in the place of another."""
        with _using(f"{self._location}/{name}"):
            self._store.pipe_file(f"{self._root}/{name}", content, chunksize=_ONE_PUT_BYTES)

    def change(self, name: str, edit: Callable[[bytes], bytes]) -> None:
        """Replaces the content of an object, or of none, by what `edit` makes of it.

        Where another process does likewise at the same time, no change is lost: the object is only replaced
        if it is still what `edit` was given, else `edit` is called anew.
        """
        path, location = f"{self._root}/{name}", f"{self._location}/{name}"
        for _ in range(_CHANGES_AT_ONCE):
            with _using(location):
                try:
                    # The version first: if the content is newer, the PUT is refused.
                    condition = {"IfMatch": self._store.info(path, refresh=True)["ETag"]}
                    before = self._store.cat_file(path)
                except FileNotFoundError:
                    condition, before = {"IfNoneMatch": "*"}, b""
            after = edit(before)
            with _using(location):
                try:
                    self._store.pipe_file(path, after, chunksize=_ONE_PUT_BYTES, **condition)
                    return
                except OSError as error:
                    if _code(error) not in _LOST:
                        raise
        raise ProPhyError(
            f"others changed {location} {_CHANGES_AT_ONCE} times before this command could; run it again"
        )


def open_output(location: str) -> FolderOutput | S3Output:
    """The output at a folder or URL, as `generate.output` has it."""
    return S3Output(location) if is_url(location) else FolderOutput(location)


def _code(error: OSError) -> str | None:
    """What S3 calls the error that s3fs made this one of."""
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code")


@contextmanager
def _using(location: str) -> Iterator[None]:
    with mendable(f"generate.output: cannot use {location}"), asking("it"):
        yield
