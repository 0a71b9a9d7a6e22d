"""Copies of files in S3: made once, whole, right, and no more than may be."""

import fcntl
import hashlib
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.places import S3Path
from prophy.schema import DamagedFileError, MissingFileError, open_file
from prophy.staging import on_disk, tell_staging
from tests.disks import lock_as_nfs_does, small_disk

MANY = 10**9
FOLDER = S3Path("s3://bucket/cache", "cache.output")


@pytest.fixture
def store(bucket: S3FileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3FileSystem:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "home"))
    return bucket


def put(content: bytes) -> S3Path:
    file = FOLDER / f"{hashlib.sha256(content).hexdigest()}.parquet"
    file.put(content)
    return file


def copies() -> set[str]:
    return {copy.name for copy in (home() / "cache").iterdir() if not copy.name.startswith(".")}


def read(file: S3Path, max_bytes: int = MANY) -> bytes:
    with on_disk(file, max_bytes) as path:
        return path.read_bytes()


def test_a_file_on_a_disk_is_read_where_it_lies(tmp_path: Path) -> None:
    with on_disk(tmp_path / "file", 0) as path:
        assert path == tmp_path / "file"


def test_rows_are_read_from_a_copy_that_stays(store: S3FileSystem) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2, 3]}), buffer, row_group_size=1)
    file = put(buffer.getvalue().to_pybytes())
    for _ in range(2):
        with on_disk(file, MANY) as path, open_file(path) as rows:
            assert rows.read_row_group(1).to_pydict() == {"x": [2]}
        file.unlink()
    assert copies() == {file.name}


def test_those_that_ask_at_once_fetch_it_once(store: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fetched, read_bytes = put(b"a"), list[str](), S3Path.read_bytes

    def counted(path: S3Path) -> bytes:
        fetched.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(S3Path, "read_bytes", counted)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, 16 * [file])) == {b"a"}
    assert fetched == [file.name]


def test_the_least_recently_used_goes_first_and_none_that_is_being_read(store: S3FileSystem) -> None:
    a, b, c, d = (put(letter * 10) for letter in (b"a", b"b", b"c", b"d"))
    for file in (a, b, a, c):  # of which two may stay
        assert len(read(file, 20)) == 10
    assert copies() == {a.name, c.name}
    with ExitStack() as stack:
        reading = stack.enter_context(on_disk(a, 20))
        for file in (b, c, d):
            read(file, 20)
        assert copies() == {a.name, d.name} and reading.read_bytes() == 10 * b"a"
        stack.enter_context(on_disk(d, 20))
        read(b, 20)
        assert copies() == {a.name, b.name, d.name}, "two of them are being read"
    read(c, 20)
    assert copies() == {b.name, c.name}
    with pytest.raises(ProPhyError, match="takes 10 bytes, and cache.max_staged_bytes is 9; raise it"):
        read(a, 9)


def test_copies_make_room_for_others_on_a_small_disk(
    store: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = [put(number * (200 << 10)) for number in (b"a", b"b", b"c")]
    with small_disk(tmp_path / "small", 512 << 10) as disk:
        monkeypatch.setenv("PROPHY_HOME", str(disk))
        for file in files:
            read(file)
        assert copies() == {files[1].name, files[2].name}
        tell_staging({FOLDER: [file.name for file in files[1:]]}, MANY)
        assert "copied again" not in caplog.text
        tell_staging({FOLDER: [file.name for file in files]}, MANY)
        assert "has room for 0.00 GB of that, so files are copied again and again" in caplog.text


def test_copies_are_locked_as_nfs_wants_it(store: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lock_as_nfs_does)
    a, b = put(b"a"), put(b"b")
    assert (read(a, 1), read(b, 1)) == (b"a", b"b") and copies() == {b.name}


def test_what_a_killed_process_left_is_removed(store: S3FileSystem) -> None:
    file, left = put(b"a"), home() / "cache" / f".{32 * 'a'}.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    read(file)
    assert not left.exists()


def test_what_is_not_what_its_name_says_is_not_kept(store: S3FileSystem) -> None:
    file = put(b"a")
    file.put(b"b")
    with pytest.raises(DamagedFileError, match=f"^{file} holds other bytes than its name says; run"):
        read(file)
    assert not copies()
    file.unlink()
    with pytest.raises(MissingFileError, match=f"^{file} is gone"):
        read(file)


def test_a_folder_that_cannot_be_written_to(store: S3FileSystem, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(
        ProPhyError, match="cannot keep copies in .*/home/cache .PROPHY_HOME.*: Not a directory"
    ):
        read(put(b"a"))


def test_how_much_is_copied_is_told(
    store: S3FileSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [put(letter * 10**7).name for letter in (b"a", b"b")]
    with caplog.at_level(logging.INFO, "prophy.staging"):
        tell_staging({tmp_path: ["of a disk"]}, 0)
        tell_staging({FOLDER: names, tmp_path: []}, MANY)
        tell_staging({FOLDER: names}, 10**7)
    first, again, warning = (each.message for each in caplog.records if each.name == "prophy.staging")
    assert re.match("2 files of the cache, 0.02 GB, are copied from S3 to .*/cache of", first)
    assert again == first and "cache.max_staged_bytes (0.01 GB) is less than that" in warning
