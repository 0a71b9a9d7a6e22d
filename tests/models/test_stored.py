"""Models in S3: one copy of what lies there, whole or none, and the same model as in a folder."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from s3fs import S3FileSystem

from pipelines.generation.limits import model_fingerprint
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models import stored
from prophy.models.stored import local_folder
from tests.conftest import tiny_config
from tests.disks import small_disk
from tests.object_store import object_store

URL = "s3://bucket/deep/model"
FILES = {"physics_branch.json": b"{}", "physics_branch.safetensors": bytes(100), "below/notes.txt": b""}
KILLED = """
import os, signal, sys
from s3fs import S3FileSystem

async def die(self, source, copy, **options):
    with open(copy, "wb") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

S3FileSystem._get_file = die
from prophy.models.stored import local_folder
local_folder(sys.argv[1])
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "home"))
    another_process()
    with object_store() as found:
        found.mkdir("bucket")
        yield found
    another_process()


def another_process() -> None:
    """What follows sees the store as a process does that has not looked yet."""
    stored._copy_of.cache_clear()


def put(store: S3FileSystem, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        store.pipe_file(f"bucket/deep/model/{name}", content)


def files_in(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def copies() -> list[str]:
    return sorted(path.name for path in (stored.home() / "s3").iterdir() if path.suffix != ".lock")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path


def test_a_model_is_the_same_in_s3_as_in_a_folder(
    store: S3FileSystem, branch_checkpoint: Path, tmp_path: Path
) -> None:
    put(store, files_in(branch_checkpoint))
    store.call_s3("put_object", Bucket="bucket", Key="deep/model/", Body=b"")  # as consoles do
    store.pipe_file("bucket/deep/model-of-others/physics_branch.json", b"{}")
    assert files_in(local_folder(f"{URL}/")) == files_in(branch_checkpoint)
    assert fingerprint(URL, None) == fingerprint(str(branch_checkpoint), None)
    here, there = (
        model_fingerprint(tiny_config(tmp_path, f"checkpoint={place}")) for place in (branch_checkpoint, URL)
    )
    assert here == there
    assert len(copies()) == 1


def test_what_is_written_anew_gets_another_copy(store: S3FileSystem) -> None:
    put(store, FILES)
    first = local_folder(URL)
    inode = (first / "physics_branch.json").stat().st_ino
    another_process()
    assert local_folder(URL) == first
    assert (first / "physics_branch.json").stat().st_ino == inode, "it was not copied again"

    put(store, changed := FILES | {"physics_branch.safetensors": bytes(99) + b"1"})
    assert files_in(local_folder(URL)) == FILES, "a process goes on with what it has begun with"
    another_process()
    second = local_folder(URL)
    assert files_in(second) == changed and files_in(first) == FILES
    assert copies() == sorted([first.name, second.name])


def test_copies_asked_for_at_once_are_made_once(
    store: S3FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, FILES)
    with caplog.at_level(logging.INFO, "prophy"), ThreadPoolExecutor(4) as pool:
        [folder] = {*pool.map(local_folder, [URL] * 4)}
    assert files_in(folder) == FILES
    assert len([record for record in caplog.records if "are copied from" in record.message]) == 1


def test_a_killed_copy_does_not_count(store: S3FileSystem) -> None:
    put(store, FILES)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, "-c", KILLED, URL], env=environment, check=False)
    assert ended.returncode == -9
    [left] = copies()
    assert left.endswith(".partial")
    for other in ("killed", "at-work"):
        (stored.home() / "s3" / f"wan2.2-{other}.partial" / "below").mkdir(parents=True)
    with FileLock(stored.home() / "s3" / "wan2.2-at-work.lock"):
        assert files_in(local_folder(URL)) == FILES
    assert [name for name in copies() if name.endswith(".partial")] == ["wan2.2-at-work.partial"]


@pytest.mark.parametrize("new", [bytes(100), b"shorter", None], ids=["as-long", "shorter", "removed"])
def test_a_model_that_changes_while_it_is_copied(
    store: S3FileSystem, monkeypatch: pytest.MonkeyPatch, new: bytes | None
) -> None:
    put(store, FILES | {"physics_branch.safetensors": b"old" + bytes(97)})
    get = S3FileSystem._get_file

    async def get_and_change(self: S3FileSystem, source: str, copy: str, **options: Any) -> None:
        await get(self, source, copy, **options)
        if source.endswith("safetensors"):
            await (self._rm_file(source) if new is None else self._pipe_file(source, new))

    monkeypatch.setattr(S3FileSystem, "_get_file", get_and_change)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(ProPhyError, match=f"^{URL} has changed while it was copied; run the same command"):
        local_folder(URL)
    assert copies() == []


def test_refusals(store: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, url: str = URL) -> None:
        with pytest.raises(ProPhyError, match=message):
            local_folder(url)

    refused("cannot use s3://nobucket/x: .*bucket does not exist; mend", "s3://nobucket/x")
    refused(f"no whole model lies at {URL}, which has neither .* `prophy export` wrote to its end")
    put(store, {"physics_branch.safetensors": b"of a killed export", "transformer/config.json": b""})
    refused(f"no whole model lies at {URL}")
    put(store, {"model_index.json": b"{}", "large": bytes(1 << 18)})
    with small_disk(tmp_path / "disk", 1 << 17) as disk:
        monkeypatch.setenv("PROPHY_HOME", str(disk))
        refused(f"{URL} takes 0.00 GB in {disk}/s3, and 0.00 GB are free; make room there")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "file"))
    refused(f"cannot use {tmp_path}/file/s3: Not a directory; mend that")

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Path(os.environ["AWS_CONFIG_FILE"]).write_text("[default]\nregion = us-east-1\n")
    S3FileSystem.clear_instance_cache()
    refused("cannot use .*NoCredentials.*; mend that")


def test_a_name_that_leads_out_of_the_folder(store: S3FileSystem) -> None:
    put(store, FILES | {"/etc/passwd": b""})
    with pytest.raises(ProPhyError, match="a file called '/etc/passwd', which is no name in a folder"):
        local_folder(URL)
