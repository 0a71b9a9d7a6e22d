"""SHA-256 of files. That of a large one is computed once on a machine: every process asks for the models'."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock

_NOTED_BYTES = 1 << 20  # what is smaller is read as fast as a note


def home() -> Path:
    """The folder of what is kept between runs: `$PROPHY_HOME`, by default `~/.cache/prophy`."""
    # Containers and files of environments say `~` without a shell that would replace it.
    return Path(os.environ.get("PROPHY_HOME") or "~/.cache/prophy").expanduser().absolute()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    For a large file it is noted in `home() / "sha256"`, under the file's place, size and times of change.
    Processes that ask at the same time read it once: one computes, the others wait for its note.
    """
    status = path.stat()
    if status.st_size < _NOTED_BYTES:
        return _compute(path)
    note = _note(path, status)
    with suppress(OSError):
        return note.read_text()
    with ExitStack() as stack:
        with suppress(OSError):  # where nothing can be noted, each process computes
            note.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(note.with_suffix(".lock")))
            return note.read_text()
        digest = _compute(path)
        if note == _note(path, path.stat()):  # it did not change meanwhile
            with suppress(OSError):
                _write_at_once(note, digest)
    return digest


def files_sha256(folder: Path, files: Iterable[Path]) -> str:
    """One SHA-256, in hexadecimal, of the content of files in a folder, and of their names there."""
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(folder) for file in files if file.is_file()):
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def sources_sha256(*places: Path) -> str:
    """One SHA-256, in hexadecimal, of the content of Python files: of these, and of all in these folders."""
    files = [
        file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])
    ]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _note(path: Path, status: os.stat_result) -> Path:
    # The inode's time of change moves with every write, also where the modification time is put back.
    identity = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return home() / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_at_once(path: Path, text: str) -> None:
    """So that a process that reads meanwhile finds all of it, or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
