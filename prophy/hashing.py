"""SHA-256 of files. That of a large one is computed once on a machine: every process asks for the models'."""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_NOTED_BYTES = 1 << 20  # what is smaller is read as fast as a note


def home() -> Path:
    """The folder of what is kept between runs: `$PROPHY_HOME`, by default `~/.cache/prophy`."""
    return Path(os.environ.get("PROPHY_HOME") or Path.home() / ".cache" / "prophy")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    For a large file it is noted in `home() / "sha256"`, under the file's place, size and times of change.
    """
    status = path.stat()
    if status.st_size < _NOTED_BYTES:
        return _compute(path)
    note = _note(path, status)
    with suppress(OSError):
        return note.read_text()
    digest = _compute(path)
    # It did not change meanwhile. Where nothing can be noted, the next process computes it again.
    if note == _note(path, path.stat()):
        with suppress(OSError):
            _write_at_once(note, digest)
    return digest


def _note(path: Path, status: os.stat_result) -> Path:
    # The inode's time of change moves with every write, also where the modification time is put back.
    identity = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return home() / "sha256" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_at_once(path: Path, text: str) -> None:
    """So that a process that reads meanwhile finds all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
