"""An export to S3: what a folder gets, and nothing that counts before it is whole."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pipelines.config import Config
from pipelines.training import export, upload
from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.models.description import branches_in
from tests.disks import small_disk
from tests.object_store import make_bucket, num_versions, object_store, refuse_puts

URL = "s3://bucket/deep/model"
FIRST = "physics_branch.safetensors"  # sent before the file by which readers know a branch
KILLED = """
import itertools, os, signal
from s3fs import S3FileSystem

put, number = S3FileSystem._put_file, itertools.count(1)

async def put_or_die(*args, **options):
    if next(number) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    await put(*args, **options)

S3FileSystem._put_file = put_or_die
from pipelines.cli import main
main()
"""


@pytest.fixture
def store() -> Iterator[S3FileSystem]:
    with object_store() as found:
        make_bucket(found, "bucket")
        yield found


def files_in(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def objects_in(store: S3FileSystem) -> dict[str, bytes]:
    found = store.find("bucket/deep/model")
    return {path.removeprefix("bucket/deep/model/"): store.cat_file(path) for path in found}


@pytest.mark.parametrize("complete", [False, True])
def test_s3_gets_what_a_folder_gets(
    trained: Config, store: S3FileSystem, tmp_path: Path, complete: bool
) -> None:
    upload.run(trained, URL, 7, complete)
    assert objects_in(store) == files_in(export.run(trained, tmp_path / "model", 7, complete))
    assert {*num_versions(store, "bucket").values()} == {1}
    assert [path.name for path in (home() / "exports").iterdir()] == [".lock"]


def test_what_cannot_be_sent_is_no_model_and_the_same_command_goes_on(
    trained: Config, store: S3FileSystem, tmp_path: Path
) -> None:
    refuse_puts(store, "bucket", f"deep/model/{FIRST}")
    with pytest.raises(ProPhyError, match=f"cannot export to {URL}: Forbidden; mend that, and run the same"):
        upload.run(trained, URL, 7, complete=False)
    assert not objects_in(store)
    store.call_s3("delete_bucket_policy", Bucket="bucket")
    store.pipe_file(f"bucket/deep/model/{FIRST}", b"of an export that was killed")
    upload.run(trained, URL, 7, complete=False)
    assert objects_in(store) == files_in(export.run(trained, tmp_path / "model", 7, complete=False))


def test_refusals(trained: Config, store: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, url: str = URL) -> None:
        with pytest.raises(ProPhyError, match=message):
            upload.run(trained, url, 7, complete=False)

    refused("cannot export to s3://nobucket/x: .*bucket does not exist; mend", "s3://nobucket/x")
    for there, message in {
        "model_index.json": f"{URL}/model_index.json exists; choose another folder for the export",
        "low_noise/physics_branch.json": f"{URL}/low_noise/physics_branch.json exists; choose another",
        "video.mp4": f"{URL}/video.mp4 is no part of this export; choose an empty folder",
    }.items():
        store.pipe_file(f"bucket/deep/model/{there}", b"theirs")
        refused(message)
        assert objects_in(store) == {there: b"theirs"}
        store.rm_file(f"bucket/deep/model/{there}")
    store.pipe_file("bucket/deep/model-of-others/video.mp4", b"")
    upload.run(trained, URL, 7, complete=False)
    refused(f"{URL}/physics_branch.json exists")

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Path(os.environ["AWS_CONFIG_FILE"]).write_text("[default]\nregion = us-east-1\n")
    S3FileSystem.clear_instance_cache()
    refused("cannot export to .*NoCredentials.*; mend that")


def test_no_room_to_make_it(
    trained: Config, store: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(map(len, files_in(export.run(trained, tmp_path / "model", 7, complete=False)).values()))
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        monkeypatch.setenv("PROPHY_HOME", str(disk))
        said = f"the export takes {needed / 1e9:.2f} GB in {disk}/exports/.*, and 0.00 GB are free; make room"
        with pytest.raises(ProPhyError, match=said):
            upload.run(trained, URL, 7, complete=False)
    assert not objects_in(store)


def test_half_of_two_branches_is_no_model(trained: Config, tmp_path: Path) -> None:
    low = export.run(trained, tmp_path / "low_noise", 7, complete=False)
    (tmp_path / "high_noise").mkdir()
    shutil.copy(low / FIRST, tmp_path / "high_noise" / FIRST)
    with pytest.raises(ProPhyError, match="no trained branch in .*/high_noise"):
        branches_in(tmp_path)


@pytest.mark.heavy
def test_a_killed_export_leaves_no_model(trained: Config, store: S3FileSystem, tmp_path: Path) -> None:
    options = ["export", URL, "--complete", "--step", "7", "--set", f"run_dir={trained.run_dir}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}

    def start(*python: str) -> int:
        return subprocess.run([sys.executable, *python, *options], env=environment, check=False).returncode

    assert start("-c", KILLED) == -9
    left = objects_in(store)
    assert len(left) == 2 and "model_index.json" not in left
    assert len(list((home() / "exports").iterdir())) == 3, "which the next one removes"
    assert start("-m", "pipelines.cli") == 0
    assert objects_in(store) == files_in(export.run(trained, tmp_path / "model", 7, complete=True))
    assert json.loads(objects_in(store)["model_index.json"])["_class_name"] == "ProPhyWanPipeline"
    assert [path.name for path in (home() / "exports").iterdir()] == [".lock"]
