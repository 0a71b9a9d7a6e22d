"""Hashes that are computed once, and again where a file has changed."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prophy import hashing
from prophy.hashing import file_sha256, home, sources_sha256

LARGE = bytes(2 << 20)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "home"))


def test_the_home_is_one_folder_wherever_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in {"~/disk": "disk", "": ".cache/prophy", "here": "here"}.items():
        monkeypatch.setenv("PROPHY_HOME", value)
        monkeypatch.chdir(tmp_path)
        assert home() == tmp_path / expected


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("large", LARGE), ("small", b"123")):
        path = tmp_path / name
        path.write_bytes(content)
        assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    [note] = [file for file in (home() / "sha256").iterdir() if file.suffix != ".lock"]
    monkeypatch.setattr(hashing, "_compute", None)
    assert file_sha256(tmp_path / "large") == note.read_text()


def test_those_who_ask_at_the_same_time_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    asked, read = threading.Barrier(4), list[Path]()
    note_of, compute = hashing._note, hashing._compute

    def note_at_once(path: Path, status: os.stat_result) -> Path:
        if not read:
            asked.wait()  # nobody has a note yet
        return note_of(path, status)

    def count(path: Path) -> str:
        read.append(path)
        return compute(path)

    monkeypatch.setattr(hashing, "_note", note_at_once)
    monkeypatch.setattr(hashing, "_compute", count)
    with ThreadPoolExecutor(4) as pool:
        digests = {*pool.map(file_sha256, [path] * 4)}
    assert digests == {hashlib.sha256(LARGE).hexdigest()} and read == [path]


def test_a_change_is_seen_though_size_and_modification_time_stay(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    before, status = file_sha256(path), path.stat()
    changed = LARGE[:-1] + b"1"
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # clocks of file systems tick every few milliseconds
        path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(changed).hexdigest() != before


def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    assert file_sha256(path) == hashlib.sha256(LARGE).hexdigest()


def test_the_digest_of_sources_is_that_of_their_content(tmp_path: Path) -> None:
    first, alone = tmp_path / "package" / "a.py", tmp_path / "alone.py"
    first.parent.mkdir()
    first.write_text("a = 1\n")
    alone.write_text("b = 1\n")
    before = sources_sha256(first.parent, alone)
    (first.parent / "notes.txt").write_text("no code")
    assert sources_sha256(first.parent, alone) == before
    alone.write_text("b = 2\n")
    other = sources_sha256(first.parent, alone)
    first.write_text("a = 2\n")
    assert len({before, other, sources_sha256(first.parent, alone)}) == 3
