"""What must be saved soon does not wait for the end of a step."""

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.layout import BEGUN_FILE, RunFolder
from pipelines.training import loop, saving
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.saving import EveryRankError, Fragment, Save
from tests.conftest import tiny_config


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Notice:
    """What Ray says of nodes that go away, each time that it is asked."""

    def __init__(self) -> None:
        self.given, self.asked = False, 0

    def __call__(self) -> str | None:
        self.asked += 1
        return "this node goes away" if self.given else None


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> Notice:
    notice = Notice()
    monkeypatch.setattr(loop.ray.train, "get_preemption_info", notice)
    monkeypatch.setattr(loop, "_ASK_EVERY_S", 0.0)
    return notice


Saves = Callable[..., loop._Saves]


@pytest.fixture
def saves(one_rank: None, tmp_path: Path) -> Saves:
    """Looks of a run that resumes from step 4; its first save is called step 1, and so on."""

    def make(*overrides: str) -> loop._Saves:
        root = tmp_path / "checkpoints"
        shutil.rmtree(root, ignore_errors=True)
        numbers = itertools.count(1)
        parts = [Fragment("a", 0, {"parameter": torch.ones(3)})]
        train = tiny_config(tmp_path / "run", "train.save_every=10", *overrides).train
        return loop._Saves(
            train,
            4,
            tmp_path / "stop",
            lambda: Save(FolderStore(str(root)), next(numbers), parts, {"a": torch.Size([3])}, {}),
        )

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[], int]:
    """Number of the newest checkpoint."""
    return lambda: max(FolderStore(str(tmp_path / "checkpoints")).committed(), default=0)


Saved = Callable[[], int]


def test_a_stop_within_a_step_saves_the_last_whole_one(
    saves: Saves, saved: Saved, notice: Notice, tmp_path: Path
) -> None:
    looks = saves()
    assert not looks.look(5, ended=True) and not looks.look(5) and not saved()
    (tmp_path / "stop").touch()
    assert looks.look(5)
    assert (saved(), looks.commit()) == (1, 5)


def test_a_stop_before_the_first_whole_step_saves_nothing(
    saves: Saves, saved: Saved, notice: Notice, tmp_path: Path
) -> None:
    looks = saves()
    (tmp_path / "stop").touch()
    assert looks.look(4) and not saved() and looks.commit() == 4


def test_a_notice_within_a_step_saves_once_and_the_step_goes_on(
    saves: Saves, saved: Saved, notice: Notice
) -> None:
    looks = saves()
    notice.given = True
    assert not looks.look(7) and saved() == 1
    assert not looks.look(7) and not looks.look(8, ended=True)
    assert (saved(), looks.commit()) == (1, 7) and notice.asked > 1


def test_what_is_due_by_number_or_time_is_saved_at_the_end_of_a_step(
    saves: Saves, saved: Saved, notice: Notice
) -> None:
    looks = saves()
    looks.look(10)
    assert looks.commit() == 4
    looks.look(10, ended=True)
    assert (looks.commit(), saved()) == (10, 1)

    looks = saves("train.save_every_s=1e-9")
    looks.look(5)
    assert looks.commit() == 4
    looks.look(5, ended=True)
    looks.look(6, ended=True)
    assert (looks.commit(), saved()) == (6, 2)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Writes end once it is set."""
    done, write = Event(), saving.save_file

    def save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
        assert done.wait(60)
        write(tensors, file)

    monkeypatch.setattr(saving, "save_file", save_file)
    return done


def test_steps_go_on_while_a_checkpoint_is_written(
    saves: Saves, saved: Saved, notice: Notice, slow_disk: Event
) -> None:
    """It holds what there was when it was begun, and counts from the first look after it is written."""
    looks = saves()
    looks.look(10, ended=True)
    looks.look(11, ended=True)
    assert not saved() and looks._save is not None
    slow_disk.set()
    looks._save._file.result()
    looks.look(11)
    assert saved() == 1 and looks._save is None


@pytest.mark.parametrize("what", ["the next", "the last", "a stop"])
def test_what_cannot_wait_waits_for_a_checkpoint_that_is_being_written(
    saves: Saves,
    saved: Saved,
    notice: Notice,
    slow_disk: Event,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    looks = saves("train.num_steps=25")
    looks.look(10, ended=True)
    if what == "a stop":
        (tmp_path / "stop").touch()
    commit = looks.commit

    def waiting() -> int:
        slow_disk.set()
        return commit()

    monkeypatch.setattr(looks, "commit", waiting)
    step = {"the next": 20, "the last": 25, "a stop": 11}[what]
    assert looks.look(step, ended=True) == (what == "a stop")
    told = "step 20 waits to be saved until step 10 is" in caplog.text
    assert (told, saved()) == ((True, 1) if what == "the next" else (False, 2))
    assert looks.commit() == step and saved() == 2


def test_a_disk_that_fails_beside_the_steps_ends_them(
    saves: Saves, saved: Saved, notice: Notice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    looks = saves()
    looks.look(10, ended=True)
    looks.commit()
    monkeypatch.setattr(saving, "save_file", full)
    looks.look(20, ended=True)
    with pytest.raises(EveryRankError, match="cannot save the checkpoint of step 2: .*No space left"):
        looks.look(21, ended=True)
        looks.look(30, ended=True)
    assert saved() == 1


@pytest.mark.parametrize(("found", "usable"), [(5, 4), (3, 2)])
def test_workers_that_do_not_divide_the_batch_start_again_as_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int, usable: int
) -> None:
    batch = ("train.micro_batch_size=2", "train.global_batch_size=16", "train.num_workers=8")
    config = tiny_config(tmp_path / "run", *batch, "train.min_workers=1")
    context = SimpleNamespace(get_world_size=lambda: found, get_world_rank=lambda: 0)
    monkeypatch.setattr(loop.ray.train, "get_context", lambda: context)
    assert loop.train_loop_per_worker({"config": config}) == usable


@pytest.fixture
def started(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a worker without a cache; it has one step to take."""
    config = tiny_config(tmp_path / "run")
    RunFolder(config.run_dir).training.mkdir(parents=True)
    context = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr(loop.ray.train, "get_context", lambda: context)
    for name in ("build_dataset", "describe_samples", "MetricsLog", "TrainingMetrics", "set_learning_rate"):
        monkeypatch.setattr(loop, name, lambda *_: None)
    monkeypatch.setattr(loop, "held_out_videos", lambda *_: [])
    monkeypatch.setattr(loop, "read_ahead", lambda *_: [([], None)])
    engine = SimpleNamespace(global_steps=0)
    monkeypatch.setattr(loop, "_load", lambda *_: (engine, None, {}))
    return {"config": config, "cache": None, "sound": None}


def test_workers_that_ray_starts_again_have_begun_no_step(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before they load the model, which lasts."""
    begun = RunFolder(started["config"].run_dir).training / BEGUN_FILE
    begun.touch()

    def load(*_: object) -> None:
        assert not begun.exists()
        raise InterruptedError("while it loads")

    monkeypatch.setattr(loop, "_load", load)
    with pytest.raises(InterruptedError):
        loop._train(started)


def test_a_disk_that_is_full_at_the_first_step_ends_every_rank(started: dict[str, Any]) -> None:
    root = RunFolder(started["config"].run_dir).training
    root.rmdir()  # cannot be written
    with pytest.raises(EveryRankError, match=f"cannot write {root / BEGUN_FILE}: .*No such file"):
        loop._train(started)
