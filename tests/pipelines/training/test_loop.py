"""What must be saved soon does not wait for the end of a step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipelines.training import loop
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
    monkeypatch.setattr(loop, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(loop, "_ASK_EVERY_S", 0.0)
    return notice


Saves = Callable[..., tuple[loop._Saves, list[str]]]


@pytest.fixture
def saves(one_rank: None, tmp_path: Path) -> Saves:
    """Looks of a run that resumes from step 4, and what it wrote."""

    def make(*overrides: str) -> tuple[loop._Saves, list[str]]:
        written: list[str] = []
        train = tiny_config(tmp_path / "run", "train.save_every=10", *overrides).train
        return loop._Saves(train, 4, tmp_path / "stop", lambda: written.append("saved")), written

    return make


def test_a_stop_within_a_step_saves_the_last_whole_one(saves: Saves, notice: Notice, tmp_path: Path) -> None:
    looks, written = saves()
    assert not looks.look(5, ended=True) and not looks.look(5) and not written
    (tmp_path / "stop").touch()
    assert looks.look(5)
    assert (looks.newest, len(written)) == (5, 1)


def test_a_stop_before_the_first_whole_step_saves_nothing(
    saves: Saves, notice: Notice, tmp_path: Path
) -> None:
    looks, written = saves()
    (tmp_path / "stop").touch()
    assert looks.look(4) and not written and looks.newest == 4


def test_a_notice_within_a_step_saves_once_and_the_step_goes_on(saves: Saves, notice: Notice) -> None:
    looks, written = saves()
    notice.given = True
    assert not looks.look(7) and not looks.look(7) and not looks.look(8, ended=True)
    assert (looks.newest, len(written)) == (7, 1) and notice.asked > 1


def test_what_is_due_by_number_or_time_is_saved_at_the_end_of_a_step(saves: Saves, notice: Notice) -> None:
    looks, written = saves()
    looks.look(10)
    assert not written
    looks.look(10, ended=True)
    assert looks.newest == 10

    looks, written = saves("train.save_every_s=1e-9")
    looks.look(5)
    assert not written
    looks.look(5, ended=True)
    looks.look(6, ended=True)
    assert (looks.newest, len(written)) == (6, 2)


@pytest.mark.parametrize(("found", "usable"), [(5, 4), (3, 2)])
def test_workers_that_do_not_divide_the_batch_start_again_as_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int, usable: int
) -> None:
    batch = ("train.micro_batch_size=2", "train.global_batch_size=16", "train.num_workers=8")
    config = tiny_config(tmp_path / "run", *batch, "train.min_workers=1")
    context = SimpleNamespace(get_world_size=lambda: found, get_world_rank=lambda: 0)
    monkeypatch.setattr(loop.ray.train, "get_context", lambda: context)
    assert loop.train_loop_per_worker({"config": config}) == usable
