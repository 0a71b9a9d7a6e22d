"""Folders on a node's disk that go with the processes that use them."""

import fcntl
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.training.scratch import scratch_folder
from tests.disks import lock_as_nfs_does


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))


@pytest.mark.parametrize("nfs", [False, True])
def test_a_folder_goes_with_the_last_that_uses_it(
    nfs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nfs:
        monkeypatch.setattr(fcntl, "flock", lock_as_nfs_does)
    place = tmp_path / "checkpoints" / "run" / "copies" / "a"
    with scratch_folder(place, lambda folder: (folder / "file").touch()) as first:
        with scratch_folder(place, lambda _: pytest.fail("it is made once")) as second:
            assert first == second == place
        assert (place / "file").exists()
    assert [path.name for path in place.parent.iterdir()] == [".lock"]


def test_what_killed_processes_left_anywhere_goes(tmp_path: Path) -> None:
    places = [
        tmp_path / parent / "left"
        for parent in ("checkpoints/a/parts", "checkpoints/a/copies", "exports", "checkpoints/b/parts")
    ]
    for place in places:
        (place.with_name("left.partial") / "deep").mkdir(parents=True)
        (place / "deep").mkdir(parents=True)
        place.with_name("left.held").touch()
    with FileLock(tmp_path / "exports" / ".lock"), places[0].with_name("left.held").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        with scratch_folder(tmp_path / "checkpoints" / "c" / "parts" / "new"):
            assert [place.exists() for place in places] == [True, False, True, False], (
                "the first is being used, and somebody is at work beside the third"
            )
            assert not places[3].with_name("left.partial").exists()
