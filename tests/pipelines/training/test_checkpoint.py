"""Checkpoints: what is committed, what is damaged, what is kept, and what a full disk leaves."""

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from s3fs import S3FileSystem

from pipelines.config import Config
from pipelines.layout import METRICS_FILE
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.checkpoint_places import FolderStore, open_checkpoints
from pipelines.training.checkpoint_store import OWNER, CheckpointStore
from pipelines.training.json_lines import read_rows
from pipelines.training.metrics import MetricsLog
from pipelines.training.saving import EveryRankError, Fragment, Save, latest_on_every_rank, writing
from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.places import place_of, write_whole
from prophy.stores import files_below, is_in_s3, open_store
from tests.disks import small_disk
from tests.object_store import object_store, refuse, refuse_puts
from tests.ranks import Result, on_ranks

SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
VALUES = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def server() -> Iterator[S3FileSystem]:
    with object_store() as found:
        yield found


@pytest.fixture
def bucket(server: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "home"))
    server.mkdir("bucket")
    yield server
    server.rm("bucket", recursive=True)


@pytest.fixture(params=["folder", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    if request.param == "folder":
        yield open_checkpoints(str(tmp_path / "checkpoints"))
        return
    request.getfixturevalue("bucket")
    yield open_checkpoints("s3://bucket/deep/run")
    assert not left_on_the_disk(), "what was copied there is gone"


def left_on_the_disk() -> list[Path]:
    return [path for path in (home() / "checkpoints").rglob("*") if path.is_file() and path.name != ".lock"]


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
    store.put(2, "rank-00000-of-00002.safetensors", 4, lambda file: file.write_bytes(b"half"))
    assert store.committed() == [1]
    write(store, 3)
    assert names(store) == files_of(1) + files_of(3)


def test_a_place_is_for_one_run(store: CheckpointStore, tmp_path: Path) -> None:
    store.claim(tmp_path / "run")
    assert set(names(store)) - {f".{OWNER}.lock"} == {OWNER}, "what tried the place is gone"
    store.claim(tmp_path / "run")
    said = (
        f"^{store.location} holds the checkpoints of the run in {tmp_path}/run; choose another train.checkp"
    )
    with pytest.raises(ProPhyError, match=said):
        store.claim(tmp_path / "other")
    lose_a_file("", f"{store.location}/{OWNER}")
    store.claim(tmp_path / "other")


def test_of_two_runs_that_start_together_one_gets_the_place(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker, read = open_checkpoints(store.location), store._read

    def read_before(name: str) -> bytes | None:
        said = read(name)
        quicker.claim(tmp_path / "quicker")
        return said

    monkeypatch.setattr(store, "_read", read_before)
    with pytest.raises(ProPhyError, match=f"holds the checkpoints of the run in {tmp_path}/quicker; choose"):
        store.claim(tmp_path / "run")


def test_a_place_is_for_one_process(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two machines have a run of the same name."""
    store.claim(tmp_path / "run")
    said = f"another run writes to {store.location}; wait for it, or choose another train.checkpoints"
    with store.alone():
        lease, renewals = place_of(f"{store.location}/.lease", ""), itertools.count()
        with monkeypatch.context() as patch:
            if is_in_s3(store.location):  # a holder that renews it, without the wait
                own = lease.read_bytes()
                patch.setattr(time, "sleep", lambda _: write_whole(lease, own + b"%d" % next(renewals)))
            with pytest.raises(ProPhyError, match=said), open_checkpoints(store.location).alone():
                pass
    with store.alone():
        pass


def test_what_s3_refuses_keeps_the_checkpoint_before(bucket: S3FileSystem) -> None:
    store = open_checkpoints("s3://bucket/deep/run")
    write(store, 1, num_to_keep=1)
    for name in files_of(2):
        refuse_puts(bucket, "bucket", f"deep/run/{name}")
        said = f"cannot use {store.location}/{name}: Forbidden; mend that, and run the same command again"
        with pytest.raises(EveryRankError, match=f"^cannot save the checkpoint of step 2: .*{said}"):
            write(store, 2, num_to_keep=1)
        assert latest_step(store) == 1
        bucket.call_s3("delete_bucket_policy", Bucket="bucket")
    write(store, 2, num_to_keep=1)
    assert names(store) == files_of(2)
    refuse_puts(bucket, "bucket", "deep/*")
    with pytest.raises(
        ProPhyError, match="^train.checkpoints: cannot use s3://bucket/deep/run: Forbidden; m"
    ):
        store.claim(Path("run"))
    with pytest.raises(ProPhyError, match="cannot use s3://nobucket/run: .*bucket does not exist; mend that"):
        open_checkpoints("s3://nobucket/run").claim(Path("run"))


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    bucket: S3FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_checkpoints("s3://bucket/deep/run")
    write(store, 1, num_to_keep=1)
    refuse(bucket, "bucket", "deep/run/step-00000001/*", "s3:DeleteObject")
    write(store, 2, num_to_keep=1)
    assert store.committed() == [2, 1]
    assert "old checkpoints stay until the next one is saved: train.checkpoints: cannot use" in caplog.text
    bucket.call_s3("delete_bucket_policy", Bucket="bucket")
    write(store, 3, num_to_keep=1)
    assert names(store) == files_of(3)


def on_two_ranks(rank: int, folder: Path) -> Result:
    """What each gets to know, where S3 refuses a file of the second, and a copy arrives there damaged."""
    store = open_checkpoints("s3://bucket/run")
    parts = [Fragment("a", 3 * rank, {"parameter": VALUES["a"][rank]})]
    said: list[Any] = []

    def save(step: int) -> None:
        Save(store, step, parts, {"a": SHAPES["a"]}, {}).commit(num_to_keep=2)

    save(1)
    save(2)
    try:
        save(3)
    except EveryRankError as error:
        said.append(str(error))
    if rank == 1:

        async def spoil(self: S3FileSystem, source: str, copy: str, **options: Any) -> None:
            await S3FileSystem.get_file_before(self, source, copy, **options)
            if source.endswith("step-00000002/rank-00000-of-00002.safetensors"):
                Path(copy).write_bytes(Path(copy).read_bytes()[:-1] + b"1")

        os.environ["PROPHY_HOME"] = str(folder / "another node")
        S3FileSystem.get_file_before, S3FileSystem._get_file = S3FileSystem._get_file, spoil
        store = open_checkpoints("s3://bucket/run")
    with latest_on_every_rank(store) as checkpoint:
        said += [checkpoint.step, checkpoint.tensor("parameter", "a").tolist()]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, said)
    return {"said": gathered}


@pytest.mark.slow
def test_two_ranks_agree(bucket: S3FileSystem, tmp_path: Path) -> None:
    refuse_puts(bucket, "bucket", "run/step-00000003/rank-00001*")
    first, second = on_ranks(2, on_two_ranks, tmp_path)["said"]
    assert first == second
    said, step, values = first
    assert re.search("cannot use s3://bucket/run/step-00000003/rank-00001.*: Forbidden; mend that, and", said)
    assert step == 1 and values == VALUES["a"].tolist()
    found = {name.partition("/")[0] for name in files_below("s3://bucket/run")}
    assert found == {"step-00000001", "step-00000002.damaged", "step-00000003"}


def write_zeros(store: CheckpointStore, step: int) -> None:
    values = torch.zeros(1 << 16)
    Save(store, step, [Fragment("a", 0, {"parameter": values})], {"a": values.shape}, {}).commit(1)


def test_a_node_without_room(bucket: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_checkpoints("s3://bucket/run")
    write_zeros(store, 1)
    with small_disk(tmp_path / "disk", 1 << 17) as disk:
        monkeypatch.setenv("PROPHY_HOME", str(disk))
        store = open_checkpoints("s3://bucket/run")
        place, room = "s3://bucket/run/step-0000000", rf"takes 0.00 GB in {disk}/.*, and 0.00 GB are free; ma"
        with pytest.raises(EveryRankError, match=f"^cannot open the checkpoint of step 1: {place}1 {room}"):
            step_on_every_rank(store)
        with pytest.raises(
            EveryRankError, match=f"^cannot save the checkpoint of step 2: {place}2/r.*{room}"
        ):
            write_zeros(store, 2)
        assert not left_on_the_disk()
    assert store.committed() == [1]


def test_processes_of_a_node_share_one_copy(bucket: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    store, copied = open_checkpoints("s3://bucket/run"), []
    write(store, 1)
    write(store, 2)
    get = S3FileSystem._get_file

    async def note(self: S3FileSystem, source: str, copy: str, **options: Any) -> None:
        copied.append(source.rpartition("/")[2])
        await get(self, source, copy, **options)

    monkeypatch.setattr(S3FileSystem, "_get_file", note)
    S3FileSystem.clear_instance_cache()
    store = open_checkpoints("s3://bucket/run")
    with store.open(2) as first:
        with store.open(1), open_checkpoints("s3://bucket/run").open(2) as second:
            assert torch.equal(second.tensor("parameter", "a"), 2 * VALUES["a"])
        assert sorted(copied) == 2 * [MANIFEST] + 2 * ["rank-00000-of-00001.safetensors"]
        store.remove(2)
        assert torch.equal(first.tensor("parameter", "b"), 2 * VALUES["b"])
    assert not left_on_the_disk()


def test_what_a_killed_process_left_on_a_disk_goes(bucket: S3FileSystem) -> None:
    store = open_checkpoints("s3://bucket/run")
    write(store, 1)
    code = (
        "import os, signal\n"
        "from pipelines.training.checkpoint_places import open_checkpoints\n"
        "with open_checkpoints('s3://bucket/run').open(1):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert len(left_on_the_disk()) == 3
    assert latest_step(store) == 1
    assert not left_on_the_disk()


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
