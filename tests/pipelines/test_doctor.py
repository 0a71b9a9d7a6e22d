"""What `prophy doctor` says where all is well, and where something is not."""

from pathlib import Path

import pytest
import ray
from sqlalchemy import make_url

from pipelines import doctor
from pipelines.serving.jobs import JobStore
from prophy.errors import ProPhyError
from tests.conftest import tiny_config
from tests.object_store import object_store


def test_all_is_well_with_the_default(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.run(tiny_config(tmp_path / "run"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("ok  ") for line in lines)
    assert not list((tmp_path / "run").glob(".doctor*"))


def test_what_is_missing_is_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = "postgresql://user@127.0.0.1:1/jobs"
    config = tiny_config(tmp_path / "run", "train.gpus_per_worker=1", f"serve.database={database}")
    with pytest.raises(ProPhyError, match="^2 of 10 checks do not hold$"):
        doctor.run(config)
    lines = capsys.readouterr().out.splitlines()
    room, stored = [line for line in lines if line.startswith("no  ")]
    assert room.startswith("no  room for train: train.num_workers needs 2 x 1 CPU + 1 GPU; the cluster has")
    assert stored.startswith(f"no  job database {database}: ")


def test_room_that_an_autoscaler_makes_is_not_missing(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where workers come with demand, and the head alone is there."""
    monkeypatch.setattr(doctor, "is_autoscaling_enabled", lambda: True)
    doctor.run(tiny_config(tmp_path / "run", "train.gpus_per_worker=1"))
    lines = capsys.readouterr().out.splitlines()
    assert "ok  room for train: none yet; the command asks the autoscaler for nodes" in lines
    assert sum("asks the autoscaler" in line for line in lines) == 1


def test_gpus_that_all_tasks_see_are_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU that is not there, on a Ray that was started without the variable."""
    nodes = [node | {"Resources": node["Resources"] | {"GPU": 1.0}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(ProPhyError, match="^1 of 11 checks do not hold$"):
        doctor.run(tiny_config(tmp_path / "run"))
    [wrong] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no  ")]
    assert wrong.endswith(
        "reserves none: it does not; start Ray there with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1"
    )


def test_a_store_that_nodes_cannot_use_is_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with object_store() as store:
        store.mkdir("bucket")
        store.pipe_file("bucket/clips/a.mp4", b"")
        keys = {"cache.input": "s3://bucket/clips", "cache.output": "s3://bucket/cache"}
        keys |= {"generate.output": "s3://bucket/videos", "checkpoint": "s3://bucket/clips"}
        keys |= {"serve.videos": "s3://nobodys/videos"}
        keys["train.checkpoints"] = "s3://bucket/run"
        keys["evaluate.pairs"] = "s3://bucket/clips/a.mp4"
        keys["evaluate.contestants"] = "{mine: {checkpoint: s3://nobodys/model}}"
        with pytest.raises(ProPhyError, match="^2 of 18 checks do not hold$"):
            doctor.run(tiny_config(tmp_path / "run", *(f"{key}={url}" for key, url in keys.items())))
        assert store.find("bucket") == ["bucket/clips/a.mp4"]
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("no  ")]
    for line, key in zip(
        wrong,
        ("serve.videos s3://nobodys/videos", "evaluate.contestants.mine.checkpoint s3://nobodys/model"),
        strict=True,
    ):
        assert f"can use {key}: " in line
    assert "bucket does not exist" in wrong[0]
    assert sum(" can use " in line for line in lines) == 8


def test_a_folder_of_checkpoints_is_tried_too(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    doctor.run(tiny_config(tmp_path / "run", f"train.checkpoints={folder}"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and f"ok  rename, lock and append in {folder}" in lines
    assert sum(line.endswith(f" sees {folder}") for line in lines) == 1
    assert not [*folder.iterdir()]


def test_the_places_of_a_cache_are_tried_too(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    (videos / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("path\ngone.mp4\nvideos/a.mp4\n")
    for given in (videos, tmp_path / "list.csv"):
        doctor.run(tiny_config(tmp_path / "run", f"cache.output={cache}", f"cache.input={given}"))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 13 and f"ok  rename, lock and append in {cache}" in lines
        assert sum(line.endswith(f" sees {cache}") for line in lines) == 1
        assert sum(line.endswith(f" sees {videos / 'a.mp4'}") for line in lines) == 1
    assert not [*cache.iterdir()]


def test_an_input_that_cannot_be_used_is_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProPhyError, match="^1 of 11 checks do not hold$"):
        doctor.run(tiny_config(tmp_path / "run", f"cache.input={tmp_path}"))
    [wrong] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no  ")]
    assert wrong.startswith(f"no  videos in {tmp_path}: no videos in {tmp_path}; files that end in")


def test_a_folder_that_cannot_be_used_is_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(tmp_path / "file" / "run")
    with pytest.raises(ProPhyError, match="^2 of 8 checks do not hold$"):
        doctor.run(config)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no  ")]
    assert [line.partition(": ")[2] for line in wrong] == [
        f"[Errno 20] Not a directory: '{config.run_dir}'",
        f"[Errno 20] Not a directory: '{config.serve.output}'",
    ]


def test_the_database_of_a_server_that_runs_is_well(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    doctor.try_database(config)
    with JobStore(config.serve.database_url):
        doctor.try_database(config)
    path = Path(make_url(config.serve.database_url).database or "")
    path.write_text("no database" * 100)
    with pytest.raises(ProPhyError, match="cannot open the job database"):
        doctor.try_database(config)
