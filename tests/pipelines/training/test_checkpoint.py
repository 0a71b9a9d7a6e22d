"""Checkpoints: what is committed, what is damaged, what is kept, and what a full disk leaves."""

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
from pipelines.layout import METRICS_FILE
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.checkpoint_store import CheckpointStore, FolderStore
from pipelines.training.json_lines import read_rows
from pipelines.training.metrics import MetricsLog
from pipelines.training.saving import EveryRankError, Fragment, Save, latest_on_every_rank, writing
from prophy.errors import ProPhyError
from prophy.stores import files_below, open_store
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


@pytest.fixture(params=["folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    return FolderStore(str(tmp_path / "checkpoints"))


def write(store: CheckpointStore, step: int, num_to_keep: int = 2) -> None:
    """A checkpoint whose values are `step` times `VALUES`; the first parameter is in two fragments."""
    a, b = (step * value.flatten() for value in VALUES.values())
    parts = [Fragment("a", 0, {"parameter": a[:2]}), Fragment("a", 2, {"parameter": a[2:]})]
    parts.append(Fragment("b", 0, {"parameter": b}))
    Save(store, step, parts, SHAPES, {"name": "test"}).commit(num_to_keep)


def names(store: CheckpointStore) -> list[str]:
    """All that lies there."""
    return sorted(files_below(store.location))


def files_of(step: int) -> list[str]:
    return [f"step-{step:08d}/{name}" for name in (MANIFEST, "rank-00000-of-00001.safetensors")]


def latest_step(store: CheckpointStore) -> int | None:
    with store.latest() as checkpoint:
        return None if checkpoint is None else checkpoint.step


def step_on_every_rank(store: CheckpointStore, sound: int | None = None) -> int | None:
    with latest_on_every_rank(store, sound) as checkpoint:
        return None if checkpoint is None else checkpoint.step


def test_fragments_become_whole_again(store: CheckpointStore) -> None:
    write(store, 3)
    with store.latest() as checkpoint:
        assert (checkpoint.step, checkpoint.run, checkpoint.kinds) == (3, {"name": "test"}, {"parameter"})
        assert checkpoint.shapes == SHAPES
        assert checkpoint.place == f"{store.location}/step-00000003"
        for name, value in VALUES.items():
            assert torch.equal(checkpoint.tensor("parameter", name), 3 * value)
        assert torch.equal(checkpoint.read("parameter", "a", 1, 5), 3 * VALUES["a"].flatten()[1:5])
        with pytest.raises(ProPhyError, match=f"^{checkpoint.place} lacks ema of a"):
            checkpoint.read("ema", "a")


def test_the_oldest_go_only_after_a_new_one_is_there(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        write(store, step)
    assert store.committed() == [3, 2]
    assert names(store) == files_of(2) + files_of(3)


def test_pinned_checkpoints_stay_until_others_are_pinned(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4, 5):
        write(store, step)
        if step == 1:
            store.pin(best=1)
        elif step == 3:
            store.pin(best=1, evaluating=3)
    assert store.committed() == [5, 4, 3, 1]
    store.pin(best=3, evaluating=None)
    write(store, 6)
    assert store.committed() == [6, 5, 3]
    assert store.pinned() == {"best": 3} and latest_step(store) == 6


def change(location: str, edit: Callable[[bytes], bytes]) -> None:
    files, path = open_store(location)
    files.pipe_file(path, edit(files.cat_file(path)))


def cut_short(manifest: str, file: str) -> None:
    change(file, lambda content: content[:-1])


def change_one_bit(manifest: str, file: str) -> None:
    change(file, lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def lose_a_file(manifest: str, file: str) -> None:
    files, path = open_store(file)
    files.rm_file(path)


def cut_the_manifest(manifest: str, file: str) -> None:
    change(manifest, lambda content: content[:40])


def before_the_manifest(manifest: str, file: str) -> None:
    lose_a_file(file, manifest)


Damage = Callable[[str, str], None]


def write_and_damage(store: CheckpointStore, step: int, damage: Damage) -> None:
    write(store, step)
    damage(*(f"{store.location}/{name}" for name in files_of(step)))


@pytest.mark.parametrize(
    "damage", [cut_short, change_one_bit, lose_a_file, cut_the_manifest, before_the_manifest]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: CheckpointStore, damage: Damage) -> None:
    write(store, 1)
    write_and_damage(store, 2, damage)
    assert latest_step(store) == 1
    with store.find(2) as checkpoint:
        assert checkpoint is None
    write(store, 2)  # over what the damage left
    assert latest_step(store) == 2


@pytest.mark.parametrize("damage", [change_one_bit, lose_a_file])
def test_a_damaged_checkpoint_does_not_count_as_kept(store: CheckpointStore, damage: Damage) -> None:
    """The run that goes on from step 1 saves step 2 and then 3, with the damaged step 4 out of the way."""
    write(store, 1)
    write_and_damage(store, 4, damage)
    assert step_on_every_rank(store) == 1
    aside = [name for name in names(store) if name.startswith("step-00000004.damaged/")]
    assert f"step-00000004.damaged/{MANIFEST}" in aside
    for step in (2, 3):
        write(store, step, num_to_keep=1)
        assert names(store) == sorted(files_of(step) + aside)
    write_and_damage(store, 4, cut_short)
    assert step_on_every_rank(store) == 3  # again, over what was set aside before


def test_no_checkpoint(store: CheckpointStore) -> None:
    assert latest_step(store) is None and step_on_every_rank(store) is None and store.newest_run() is None
    write_and_damage(store, 1, before_the_manifest)
    assert latest_step(store) is None
    write_and_damage(store, 1, cut_the_manifest)
    assert store.newest_run() is None


def test_the_manifest_is_plain_json(store: CheckpointStore) -> None:
    write(store, 5)
    files, root = open_store(store.location)
    manifest = json.loads(files.cat_file(f"{root}/step-00000005/{MANIFEST}"))
    [(name, file)] = manifest["files"].items()
    assert files_below(store.location)[f"step-00000005/{name}"]["size"] == file["bytes"]
    assert len(file["sha256"]) == 64 and manifest["step"] == 5
    assert store.newest_run() == (5, {"name": "test"})


def test_what_a_killed_save_left_goes_with_the_next(store: CheckpointStore) -> None:
    write(store, 1)
    store.begin(2)
    store.put(2, "rank-00000-of-00002.safetensors", lambda file: file.write_bytes(b"half"))
    assert store.committed() == [1]
    write(store, 3)
    assert names(store) == files_of(1) + files_of(3)


def test_a_checkpoint_is_of_the_moment_it_was_begun(store: CheckpointStore) -> None:
    values = torch.zeros(1_000_000)
    save = Save(store, 1, [Fragment("a", 0, {"parameter": values})], {"a": values.shape}, {})
    values.fill_(1)
    save.commit(num_to_keep=1)
    with store.latest() as checkpoint:
        assert not checkpoint.read("parameter", "a").any()


def test_what_was_just_found_sound_is_not_hashed_again(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path))
    write_and_damage(store, 1, change_one_bit)
    assert step_on_every_rank(store, 1) == 1
    assert step_on_every_rank(store) is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files gives the error that a full disk gives: the write fails half-way."""
    store = FolderStore(str(tmp_path))
    write(store, 1, num_to_keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(EveryRankError, match="cannot save the checkpoint of step 2: .*make room"):
            write(store, 2, num_to_keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest_step(store) == 1
    write(store, 2, num_to_keep=1)
    assert latest_step(store) == 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 256 << 10) as folder:
        yield folder


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(disk: Path) -> None:
    """100 kB each: the third does not fit beside the two that are kept, until others have made room."""

    store = FolderStore(str(disk / "checkpoints"))

    def write_large(step: int) -> None:
        part = Fragment("a", 0, {"parameter": torch.full((25_000,), float(step))})
        Save(store, step, [part], {"a": torch.Size([25_000])}, {}).commit(num_to_keep=2)

    write_large(1)
    write_large(2)
    with pytest.raises(
        EveryRankError, match="cannot save the checkpoint of step 3: .*No space left.*make room"
    ):
        write_large(3)
    with store.latest() as last:
        assert last.step == 2 and torch.equal(last.read("parameter", "a"), torch.full((25_000,), 2.0))
    shutil.rmtree(disk / "checkpoints" / "step-00000001")
    write_large(3)
    assert latest_step(store) == 3


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
