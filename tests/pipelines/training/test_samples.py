"""Which samples are held out: a function of their names alone; and which losses of them compare."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipelines.layout import EVALUATION_FILE, checkpoint_name
from pipelines.training import watcher
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.json_lines import write_rows
from pipelines.training.samples import describe_held_out, held_out
from pipelines.training.watcher import best_step, comparable_rows, evaluating
from tests.conftest import tiny_config


def test_what_was_trained_on_is_never_held_out_later() -> None:
    """Clips of one video stay together; whatever joins the cache, only new videos are held out."""
    before = ["b-0-1", "b-1-2", "d-0-1", "e-0-1"]
    assert held_out(pa.array(before), 1).to_pylist() == ["b-0-1", "b-1-2"]
    for new in ("a-0-1", "c-0-1", "f-0-1"):
        later = pa.array([*before, new])
        assert {*held_out(later, 1).to_pylist()} <= {"b-0-1", "b-1-2", new}
        assert "e-0-1" not in held_out(later, 2).to_pylist()
    assert len(held_out(pa.array(before), 0)) == 0


def cached(*sample_ids: str) -> Any:
    return SimpleNamespace(sample_ids=pa.array(sample_ids))


class Store:
    """Checkpoints that are all there, and have all been looked at; it keeps what is pinned."""

    look_every_s = 0.001

    def __init__(self) -> None:
        self.pins: list[int | None] = []

    def committed(self) -> list[int]:
        return [30, 20, 10]

    def pin(self, best: int | None, evaluating: int | None = None) -> None:
        self.pins.append(best)

    def pinned(self) -> dict[str, int]:
        return {}


def test_losses_of_other_clips_do_not_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A video that joins is held out in the place of another one, and its clips may be harder."""
    store = Store()
    monkeypatch.setattr(watcher, "open_checkpoints", lambda _: store)
    config = tiny_config(tmp_path, "train.num_held_out=1")
    before, now = cached("b-0", "c-0"), cached("a-0", "b-0", "c-0")
    was, held = (describe_held_out(config, cache) for cache in (before, now))
    assert was != held and held == describe_held_out(config, cached("a-0", "d-0"))
    rows: list[dict[str, Any]] = [{"step": 5, "loss": 0.01}, {"step": 10, "held_out": was, "loss": 0.1}]
    rows += [{"step": step, "held_out": held, "loss": loss} for step, loss in ((20, 0.5), (30, 0.4))]
    write_rows(tmp_path / EVALUATION_FILE, rows)
    assert best_step(config, before, tmp_path) == 10
    assert best_step(config, now, tmp_path) == 30
    with evaluating(config, now, tmp_path):
        pass
    assert {*store.pins} == {30}
    assert "2 of the 4 rows in" in caplog.text and "of other held-out clips" in caplog.text


HELD_OUT = "train.num_held_out=1"
SAMPLES = "train.sample_prompts=[a ball]"


@pytest.mark.parametrize(
    ("override", "losses", "evaluated", "best"),
    [
        (HELD_OUT, {10: 0.3, 60: 0.5}, [10, 60], 10),
        (HELD_OUT, {10: 0.6, 60: 0.5}, [10, 60], 60),
        (HELD_OUT, {60: 0.5}, [10, 60], 60),
        (HELD_OUT, {}, [10, 60], 10),
        (SAMPLES, {}, [60], 10),
    ],
    ids=["stays the best", "is beaten", "is not measured", "nothing is measured", "nothing is held out"],
)
def test_the_best_by_other_clips_stays_until_a_loss_compares(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    losses: dict[int, float],
    evaluated: list[int],
    best: int,
) -> None:
    """Also while it is measured, where a save removes what is too much."""
    config, clips = tiny_config(tmp_path, override), cached("a-0", "b-0")
    store, seen = FolderStore(config.checkpoints), list[int]()
    for step in (10, 40, 50, 60):
        (Path(config.checkpoints) / checkpoint_name(step)).mkdir(parents=True)
        store.commit(step, {})
    store.pin(best=10)
    rows: list[dict[str, Any]] = [{"step": 10, "held_out": "others", "loss": 0.1}]
    write_rows(tmp_path / EVALUATION_FILE, rows)

    def evaluate(step: int) -> None:
        store.keep(2)
        seen.append(step)
        if step not in losses:
            raise MemoryError("no room")
        rows.append({"step": step, "held_out": describe_held_out(config, clips), "loss": losses[step]})
        write_rows(tmp_path / EVALUATION_FILE, rows)

    task = SimpleNamespace(remote=lambda *arguments: arguments[-1])
    ray = SimpleNamespace(remote=lambda _: SimpleNamespace(options=lambda **_: task), get=evaluate)
    monkeypatch.setattr(watcher, "ray", ray)
    with evaluating(config, clips, tmp_path):
        pass
    assert (seen, store.pinned()) == (evaluated, {"best": best})
    assert store.committed() == [60, 50, 10]


def test_rows_that_name_no_clips_count_where_none_are_held_out(tmp_path: Path) -> None:
    write_rows(tmp_path / EVALUATION_FILE, [{"step": 10}])
    clips = cached("a-0", "b-0")
    samples_alone = tiny_config(tmp_path, "train.sample_prompts=[a ball]")
    assert comparable_rows(samples_alone, clips, tmp_path) == [{"step": 10}]
    assert comparable_rows(tiny_config(tmp_path, "train.num_held_out=1"), clips, tmp_path) == []
