"""Outputs: a folder and a place in S3 behave alike."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pipelines.generation.output import FolderOutput, S3Output, open_output
from prophy.errors import ProPhyError
from tests.object_store import object_store, refuse_puts

URL = "s3://bucket/deep/videos"


@pytest.fixture(scope="module")
def server() -> Iterator[S3FileSystem]:
    with object_store() as found:
        yield found


@pytest.fixture
def store(server: S3FileSystem) -> Iterator[S3FileSystem]:
    server.mkdir("bucket")
    yield server
    server.rm("bucket", recursive=True)


@pytest.fixture(params=["folder", "s3"])
def output(request: pytest.FixtureRequest, store: S3FileSystem, tmp_path: Path) -> FolderOutput | S3Output:
    return open_output(str(tmp_path / "deep" / "videos") if request.param == "folder" else URL)


def test_files_are_changed_written_and_listed(
    output: FolderOutput | S3Output, store: S3FileSystem, tmp_path: Path
) -> None:
    output.change("list", lambda before: before + b"a")
    assert output.names() == {"list"} and not output.has("video")
    output.write("video", b"first")
    output.write("video", b"second")
    output.change("list", lambda before: before + b"b")
    assert output.names() == {"list", "video"} and output.has("video")
    output.change("video", lambda before: before + b", read")
    output.change("list", lambda before: before + b"c")
    if isinstance(output, S3Output):
        read = [store.cat_file(f"bucket/deep/videos/{name}") for name in ("video", "list")]
    else:
        read = [(tmp_path / "deep" / "videos" / name).read_bytes() for name in ("video", "list")]
    assert read == [b"second, read", b"abc"]


def test_a_listing_is_of_now_and_of_this_place_alone(store: S3FileSystem) -> None:
    output = open_output(URL)
    assert output.names() == set()
    for name in ("deep/videos/a", "deep/videos/below/b", "deep/videos-of-others/c", "d"):
        store.pipe_file(f"bucket/{name}", b"")
    assert output.names() & {"a", "b", "c", "d"} == {"a"}
    assert output.has("a") and not output.has("c")
    store.rm_file("bucket/deep/videos/a")
    assert "a" not in output.names() and not output.has("a")


@pytest.mark.parametrize("there", [True, False], ids=["another-change", "first-of-two"])
def test_no_change_is_lost(store: S3FileSystem, there: bool) -> None:
    output, given = open_output(URL), []
    if there:
        output.write("list", b"0")

    def edit(before: bytes) -> bytes:
        given.append(before)
        if len(given) < 3:  # another process is quicker, twice
            open_output(URL).change("list", lambda theirs: theirs + b"x")
        return before + b"y"

    output.change("list", edit)
    start = b"0" if there else b""
    assert given == [start, start + b"x", start + b"xx"]
    assert store.cat_file("bucket/deep/videos/list") == start + b"xxy"


def test_a_list_that_others_change_all_the_time(store: S3FileSystem) -> None:
    other = open_output(URL)

    def edit(before: bytes) -> bytes:
        other.change("list", lambda theirs: theirs + b"x")
        return before

    with pytest.raises(ProPhyError, match=f"others changed {URL}/list 20 times .*; run it again"):
        open_output(URL).change("list", edit)


def test_a_place_that_refuses(store: S3FileSystem, tmp_path: Path) -> None:
    refuse_puts(store, "bucket", "deep/*")
    refused = open_output(URL)
    for attempt in (lambda: refused.write("a", b""), lambda: refused.change("a", bytes)):
        with pytest.raises(ProPhyError, match=f"generate.output: cannot use {URL}/a: Forbidden; mend"):
            attempt()
    store.call_s3("delete_bucket_policy", Bucket="bucket")
    with pytest.raises(ProPhyError, match="cannot use s3://nobucket/videos/a: .*bucket does not exist; mend"):
        open_output("s3://nobucket/videos").change("a", bytes)

    (tmp_path / "file").touch()
    with pytest.raises(ProPhyError, match="generate.output: cannot use .*/file/a: File exists; mend"):
        open_output(str(tmp_path / "file")).change("a", bytes)
    with pytest.raises(ProPhyError, match="cannot use .*/not-mounted/a: No such file or directory; mend"):
        open_output(str(tmp_path / "not-mounted")).write("a", b"")
    assert not (tmp_path / "not-mounted").exists(), "it would be another folder on each node"
