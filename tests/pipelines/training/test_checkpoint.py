"""Checkpoints on disk: what is committed, what is damaged, what is kept, and what a full disk leaves."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.config import Config
from pipelines.layout import METRICS_FILE, step_of
from pipelines.training.checkpoint import MANIFEST, Checkpoint, committed, latest, pin, pinned
from pipelines.training.json_lines import read_rows
from pipelines.training.metrics import MetricsLog
from pipelines.training.saving import EveryRankError, Fragment, Save, latest_on_every_rank, writing
from prophy.errors import ProPhyError
from tests.disks import small_disk

SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
VALUES = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(root: Path, step: int, num_to_keep: int = 2) -> Path:
    """A checkpoint whose values are `step` times `VALUES`; the first parameter is in two fragments."""
    a, b = (step * value.flatten() for value in VALUES.values())
    parts = [Fragment("a", 0, {"parameter": a[:2]}), Fragment("a", 2, {"parameter": a[2:]})]
    parts.append(Fragment("b", 0, {"parameter": b}))
    Save(root, step, parts, SHAPES, {"name": "test"}).commit(num_to_keep)
    return root / f"step-{step:08d}"


def test_fragments_become_whole_again(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint = latest(tmp_path)
    assert (checkpoint.step, checkpoint.run, checkpoint.kinds) == (3, {"name": "test"}, {"parameter"})
    assert checkpoint.shapes == SHAPES
    for name, value in VALUES.items():
        assert torch.equal(checkpoint.tensor("parameter", name), 3 * value)
    assert torch.equal(checkpoint.read("parameter", "a", 1, 5), 3 * VALUES["a"].flatten()[1:5])
    with pytest.raises(ProPhyError, match="lacks ema of a"):
        checkpoint.read("ema", "a")


def test_the_oldest_go_only_after_a_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [folder.name for folder in committed(tmp_path)] == ["step-00000003", "step-00000002"]
    assert not (tmp_path / "step-00000001").exists()


def test_pinned_checkpoints_stay_until_others_are_pinned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
        if step == 1:
            pin(tmp_path, best=1)
        elif step == 3:
            pin(tmp_path, best=1, evaluating=3)
    assert [step_of(folder) for folder in committed(tmp_path)] == [5, 4, 3, 1]
    pin(tmp_path, best=3, evaluating=None)
    write(tmp_path, 6)
    assert [step_of(folder) for folder in committed(tmp_path)] == [6, 5, 3]
    assert pinned(tmp_path) == {"best": 3} and latest(tmp_path).step == 6


def cut_short(folder: Path) -> None:
    [file] = folder.glob("rank-*")
    file.write_bytes(file.read_bytes()[:-1])


def change_one_bit(folder: Path) -> None:
    [file] = folder.glob("rank-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    [file] = folder.glob("rank-*")
    file.unlink()


def cut_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def before_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage", [cut_short, change_one_bit, lose_a_file, cut_the_manifest, before_the_manifest]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    assert latest(tmp_path).step == 1
    write(tmp_path, 2)  # over what the damage left
    assert latest(tmp_path).step == 2


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    """The run that goes on from step 1 saves step 2 and then 3, with the damaged step 4 out of the way."""
    write(tmp_path, 1)
    lose_a_file(write(tmp_path, 4))
    assert latest_on_every_rank(tmp_path).step == 1
    assert (tmp_path / "step-00000004.damaged" / MANIFEST).exists()
    for step in (2, 3):
        write(tmp_path, step, num_to_keep=1)
        assert [folder.name for folder in committed(tmp_path)] == [f"step-{step:08d}"]
    cut_short(write(tmp_path, 4))
    assert latest_on_every_rank(tmp_path).step == 3  # again, over what was set aside before


def test_what_was_just_found_sound_is_not_hashed_again(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    change_one_bit(folder)
    assert latest_on_every_rank(tmp_path, folder).step == 1
    assert latest_on_every_rank(tmp_path) is None


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    before_the_manifest(write(tmp_path, 1))
    assert latest(tmp_path) is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files gives the error that a full disk gives: the write fails half-way."""
    write(tmp_path, 1, num_to_keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(EveryRankError, match="cannot save the checkpoint of step 2: .*make room"):
            write(tmp_path, 2, num_to_keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest(tmp_path).step == 1
    write(tmp_path, 2, num_to_keep=1)
    assert latest(tmp_path).step == 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 256 << 10) as folder:
        yield folder


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(disk: Path) -> None:
    """100 kB each: the third does not fit beside the two that are kept, until others have made room."""

    def write_large(step: int) -> None:
        part = Fragment("a", 0, {"parameter": torch.full((25_000,), float(step))})
        Save(disk / "checkpoints", step, [part], {"a": torch.Size([25_000])}, {}).commit(num_to_keep=2)

    write_large(1)
    write_large(2)
    with pytest.raises(
        EveryRankError, match="cannot save the checkpoint of step 3: .*No space left.*make room"
    ):
        write_large(3)
    last = latest(disk / "checkpoints")
    assert last.step == 2 and torch.equal(last.read("parameter", "a"), torch.full((25_000,), 2.0))
    shutil.rmtree(disk / "checkpoints" / "step-00000001")
    write_large(3)
    assert latest(disk / "checkpoints").step == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_disk_that_is_full_of_metrics(disk: Path, config: Config) -> None:
    """The file or TensorBoard, whichever is first; what was written before stays."""
    log = MetricsLog(disk, 0, config.train, {}, 1.0)
    losses = dict.fromkeys(("diffusion", "semantic_alignment", "token_alignment", "load_balancing"), 1.0)
    log.write(1, losses, {})
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    with (
        pytest.raises(EveryRankError, match="cannot write the metrics: .*No space left.*make room"),
        writing("write the metrics"),
    ):
        for step in range(2, 200):
            log.write(step, losses, {})
    assert read_rows(disk / METRICS_FILE)[0]["step"] == 1


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    manifest = json.loads((folder / MANIFEST).read_text())
    [(name, file)] = manifest["files"].items()
    assert file["bytes"] == (folder / name).stat().st_size and len(file["sha256"]) == 64
    assert Checkpoint(folder).step == manifest["step"] == 5


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    whole = write(tmp_path, 1)
    left = tmp_path / "step-00000002"
    left.mkdir()
    (left / "rank-00000-of-00002.safetensors").write_bytes(b"half")
    newest = write(tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == [whole, newest]


def test_a_checkpoint_is_of_the_moment_it_was_begun(tmp_path: Path) -> None:
    values = torch.zeros(1_000_000)
    save = Save(tmp_path, 1, [Fragment("a", 0, {"parameter": values})], {"a": values.shape}, {})
    values.fill_(1)
    save.commit(num_to_keep=1)
    assert not latest(tmp_path).read("parameter", "a").any()
