"""Folders on a node's disk that go with the processes that use them."""

import fcntl
from pathlib import Path

import pytest

from pipelines.training.scratch import scratch_folder
from tests.disks import lock_as_nfs_does


@pytest.mark.parametrize("nfs", [False, True])
def test_a_folder_goes_with_the_last_that_uses_it(
    nfs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nfs:
        monkeypatch.setattr(fcntl, "flock", lock_as_nfs_does)
    place = tmp_path / "copies" / "a"
    with scratch_folder(place, lambda folder: (folder / "file").touch()) as first:
        with scratch_folder(place, lambda _: pytest.fail("it is made once")) as second:
            assert first == second == place
        assert (place / "file").exists()
    assert [path.name for path in place.parent.iterdir()] == [".lock"]
