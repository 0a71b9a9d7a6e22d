"""Places for files: a folder on a disk and one in S3 behave alike."""

import pickle
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from s3fs import S3FileSystem

from prophy.errors import ProPhyError
from prophy.places import (
    Place,
    S3Path,
    append,
    change,
    clear_temporaries,
    fetched,
    folders,
    names,
    place_of,
    remove_all,
    rename,
    sha256,
    sizes,
    write_whole,
)
from prophy.stores import files_below, open_store
from tests.object_store import refuse, refuse_puts

URL = "s3://bucket/deep/files"
A_SHA256 = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"


def open_place(location: str = URL) -> Place:
    return place_of(location, "some.key")


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, bucket: S3FileSystem, tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "deep" / "files") if request.param == "disk" else f"{URL}/")


def test_files_are_written_read_changed_and_removed(folder: Place) -> None:
    file = folder / "list"
    assert not folder.is_dir() and not file.exists() and names(folder) == []
    change(file, lambda before: before + b"a")
    assert folder.is_dir() and not folder.is_file() and file.is_file() and file.read_bytes() == b"a"
    assert (sha256(file), fetched(file).read_bytes()) == (A_SHA256, b"a")
    write_whole(folder / "video", b"first")
    write_whole(folder / "video", b"second")
    append(file, b"b")
    append(folder / "new", b"c")
    change(file, lambda before: before + b"d")
    assert {name: size for name, size in sizes(folder).items() if name != ".list.lock"} == {
        "list": 3,
        "video": 6,
        "new": 1,
    }
    assert sorted(set(names(folder)) - {".list.lock"}) == ["list", "new", "video"]
    assert file.read_bytes() == b"abd"

    rename(file, "list.damaged")
    (folder / "new").unlink()
    (folder / "new").unlink(missing_ok=True)
    assert sorted(set(names(folder)) - {".list.lock"}) == ["list.damaged", "video"]
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        file.read_bytes()


def test_folders_lie_in_folders(folder: Place) -> None:
    for name in ("b", "a", "a/below"):
        inner = folder / name
        inner.mkdir(parents=True, exist_ok=True)
        write_whole(inner / "file", b"")
    write_whole(folder / "file", b"")
    assert folders(folder) == [folder / "a", folder / "b"]
    assert folders(folder / "none") == [] and sizes(folder / "none") == {}
    inner = folder / "a" / "below"
    assert (inner.name, inner.parent, str(inner)) == ("below", folder / "a", f"{folder}/a/below")
    remove_all(folder / "a")
    remove_all(folder / "none")
    assert folders(folder) == [folder / "b"] and not inner.is_dir()


def test_names_are_no_patterns_and_no_chains(bucket: S3FileSystem) -> None:
    place = open_place("s3://bucket/runs::1[ab]?*")
    for name in ("one[1]*", "two?", "three::3"):
        write_whole(place / name, name.encode())
    bucket.pipe_file("bucket/runs::1a-/other", b"")
    assert sorted(files_below(str(place))) == sorted(names(place)) == ["one[1]*", "three::3", "two?"]
    assert (place / "three::3").read_bytes() == b"three::3"
    rename(place / "two?", "four::4*")
    assert bucket.call_s3("head_object", Bucket="bucket", Key="runs::1[ab]?*/four::4*")
    remove_all(place)
    assert not place.is_dir() and bucket.find("bucket") == ["bucket/runs::1a-/other"]


def test_a_large_folder_is_removed(bucket: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_whole(open_place() / str(number), b"")
    call = S3FileSystem.call_s3

    def in_pages(store: S3FileSystem, method: str, **arguments: Any) -> Any:
        return call(store, method, **arguments | ({"MaxKeys": 2} if method == "list_objects_v2" else {}))

    monkeypatch.setattr(S3FileSystem, "call_s3", in_pages)
    remove_all(open_place())
    assert not open_place().is_dir()


def test_what_cannot_be_removed_is_told(bucket: S3FileSystem) -> None:
    write_whole(open_place() / "a", b"")
    refuse(bucket, "bucket", "deep/*", "s3:DeleteObject")
    with pytest.raises(ProPhyError, match=f"cannot use {URL}: deep/files/a cannot be removed: AccessDenied"):
        remove_all(open_place())
    bucket.call_s3("delete_bucket_policy", Bucket="bucket")


def test_a_list_may_name_a_version_of_a_file(bucket: S3FileSystem) -> None:
    bucket.call_s3("put_bucket_versioning", Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    put = partial(bucket.call_s3, "put_object", Bucket="bucket", Key="a.mp4")
    first, _ = put(Body=b"first"), put(Body=b"second")
    store, path = open_store(f"s3://bucket/a.mp4?versionId={first['VersionId']}")
    assert store.cat_file(path) == b"first"
    store, path = open_store("s3://bucket/a.mp4")
    assert store.cat_file(path) == b"second"
    for version in bucket.call_s3("list_object_versions", Bucket="bucket")["Versions"]:
        bucket.call_s3("delete_object", Bucket="bucket", Key="a.mp4", VersionId=version["VersionId"])


class ConflictError(Exception):
    """What S3 answers while another conditional PUT is under way, as s3fs gets it."""

    response: ClassVar = {"Error": {"Code": "ConditionalRequestConflict"}}


def test_a_put_waits_for_another_under_way(bucket: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    file, put, waits = S3Path(f"{URL}/a", "some.key"), S3FileSystem.call_s3, list[float]()
    monkeypatch.setattr(time, "sleep", waits.append)
    conflicts = iter(range(2))

    def conflicting(store: S3FileSystem, method: str, **arguments: Any) -> Any:
        if method == "put_object" and next(conflicts, None) is not None:
            raise OSError("ConditionalRequestConflict") from ConflictError()
        return put(store, method, **arguments)

    monkeypatch.setattr(S3FileSystem, "call_s3", conflicting)
    assert file.put(b"a", IfNoneMatch="*") and len(waits) == 2
    assert file.put(b"b", IfNoneMatch="*") is None
    conflicts = iter(range(1000))
    with pytest.raises(ProPhyError, match="ConditionalRequestConflict"):
        file.put(b"b", IfNoneMatch="*")


def test_what_a_killed_process_leaves_on_a_disk(tmp_path: Path) -> None:
    left, other = tmp_path / "below" / f".{32 * 'a'}.tmp", tmp_path / ".notes.tmp"
    left.parent.mkdir()
    left.touch()
    other.touch()
    clear_temporaries(tmp_path)
    assert other.exists() and not left.exists()


def test_a_listing_is_of_now_and_of_this_place_alone(bucket: S3FileSystem) -> None:
    place = open_place()
    assert names(place) == []
    for name in ("files/a", "files/below/b", "files-of-others/c", "d"):
        bucket.pipe_file(f"bucket/deep/{name}", b"")
    assert names(place) == ["a"]
    bucket.rm_file("bucket/deep/files/a")
    assert names(place) == [] and place.is_dir() and not (place / "a").exists()


def test_a_bucket_is_a_place_too(bucket: S3FileSystem) -> None:
    place = open_place("s3://bucket")
    assert not place.is_dir()
    write_whole(place / "a", b"a")
    assert place.is_dir() and names(place) == ["a"]


def test_what_was_fetched_is_not_asked_for_again(bucket: S3FileSystem) -> None:
    write_whole(open_place() / "a", b"a")
    file = fetched(open_place() / "a")
    bucket.rm_file(f"{URL}/a")
    assert file.read_bytes() == b"a" and str(file) == f"{URL}/a"


def test_a_place_can_be_sent_to_another_process() -> None:
    place = open_place()
    assert pickle.loads(pickle.dumps(place)) == place == S3Path(URL, "whatever.names.it")


@pytest.mark.parametrize("there", [True, False], ids=["another-change", "first-of-two"])
def test_no_change_is_lost(bucket: S3FileSystem, there: bool) -> None:
    file, given = open_place() / "list", []
    if there:
        write_whole(file, b"0")

    def edit(before: bytes) -> bytes:
        given.append(before)
        if len(given) < 3:  # another process is quicker, twice
            change(open_place() / "list", lambda theirs: theirs + b"x")
        return before + b"y"

    change(file, edit)
    start = b"0" if there else b""
    assert given == [start, start + b"x", start + b"xx"]
    assert file.read_bytes() == start + b"xxy"


def test_a_file_that_others_change_all_the_time(bucket: S3FileSystem) -> None:
    file = open_place() / "list"

    def edit(before: bytes) -> bytes:
        change(open_place() / "list", lambda theirs: theirs + b"x")
        return before

    with pytest.raises(ProPhyError, match=f"others changed {URL}/list 20 times .*; run it again"):
        change(file, edit)


def test_a_place_that_refuses(bucket: S3FileSystem, tmp_path: Path) -> None:
    refuse_puts(bucket, "bucket", "deep/*")
    file = open_place() / "a"
    for attempt in (lambda: write_whole(file, b""), lambda: change(file, bytes), lambda: append(file, b"")):
        with pytest.raises(ProPhyError, match=f"^some.key: cannot use {URL}/a: Forbidden; mend"):
            attempt()
    bucket.call_s3("delete_bucket_policy", Bucket="bucket")
    with pytest.raises(ProPhyError, match="cannot use s3://nobucket/a: .*bucket does not exist; mend"):
        change(open_place("s3://nobucket/a"), bytes)

    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "not-mounted" / "a", b"")
    assert not (tmp_path / "not-mounted").exists(), "it would be another folder on each node"


def test_no_change_is_lost_on_a_disk(tmp_path: Path) -> None:
    file = tmp_path / "list"
    other = threading.Thread(target=change, args=(file, lambda before: before + b"b"))

    def edit(before: bytes) -> bytes:
        other.start()
        other.join(0.2)  # without a lock it would have ended by now, and be lost
        return before + b"a"

    change(file, edit)
    other.join()
    assert file.read_bytes() == b"ab"
