"""A graph that finds no room starts again on what is left; and what the table of stages says."""

import io
import logging
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy
from rich.console import Console

from pipelines import resources
from pipelines.caching import progress
from pipelines.caching.progress import (
    GraphReport,
    StageReport,
    complete,
    execute,
    print_stages,
    show_progress,
)
from prophy.errors import ProPhyError

REPORT = GraphReport(
    written=90,
    failed=10,
    seconds=40.0,
    stages=[
        StageReport("ReadClip", 100, busy_s=6.0, workers=2, first_s=2.0, last_s=25.0),
        StageReport("ExtractPriors", 100, busy_s=36.0, workers=2, first_s=10.0, last_s=29.0),
        StageReport("WriteRows", 100, busy_s=0.5, workers=1, first_s=12.0, last_s=30.0),
    ],
)


def test_utilisation_is_of_the_time_since_the_busiest_stage_began() -> None:
    read, extract, _ = REPORT.stages
    assert REPORT.busiest is extract
    assert REPORT.span_s == 20.0
    assert REPORT.utilisation(extract) == pytest.approx(0.9)
    assert REPORT.utilisation(read) == pytest.approx(0.15)


def test_the_table_names_every_stage() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_stages(console, "priors", REPORT)
    lines = console.export_text().splitlines()
    [extract] = [line for line in lines if "ExtractPriors" in line]
    assert "90%" in extract and "36.0" in extract
    assert sum("ReadClip" in line or "WriteRows" in line for line in lines) == 2


def test_what_comes_one_by_one_is_passed_on_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO):
        assert list(show_progress(iter("abc"), "read", 5, "files", step=2)) == [*"abc"]
    counted = [message.partition(",")[0] for message in caplog.messages]
    assert counted == ["read: 2/5 files", "read: 4/5 files", "read: 5/5 files"]
    assert "5/5" in capsys.readouterr().out


class Count:
    """In place of the stages and the sink: each row is a clip that is written, in a file of its own."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        counts = {"written": 1, "failed": 0, "share": 1.0, "files": [f"{rows['clip'][0]}.parquet"]}
        return pa.Table.from_pylist([counts])


class Holder:
    """Takes CPUs from all others, as the actors do that moved here from a lost node."""

    def there(self) -> None:
        pass


@pytest.fixture
def soon(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is stalled as soon as it has not moved for a second."""
    monkeypatch.setattr(resources, "_STALLED_AFTER_S", 1.0)
    monkeypatch.setattr(resources, "_LOOK_EVERY_S", 0.5)


def run(work: pa.Table) -> GraphReport:
    graph = ray.data.from_items(work.to_pylist(), override_num_blocks=len(work)).map_batches(
        Count, batch_size=1, batch_format="pyarrow", num_cpus=12, compute=ActorPoolStrategy(size=1)
    )
    return execute(graph, "clips", len(work), {"Count": 1})


def test_a_graph_that_finds_no_room_starts_again_once_there_is_some(soon: None) -> None:
    holder: Any = ray.remote(Holder).options(num_cpus=8).remote()  # of 16
    ray.get(holder.there.remote())
    lists = iter([pa.table({"clip": [1, 2, 3]}), pa.table({"clip": [2, 3]})])

    def left() -> pa.Table:
        work = next(lists)
        if len(work) < 3:
            ray.kill(holder)
        return work

    report = complete(left, run)
    assert (report.written, report.failed, report.stalled) == (2, 0, "")
    assert sorted(report.files) == ["2.parquet", "3.parquet"]


def test_a_graph_that_never_finds_room_ends_with_a_sentence(soon: None) -> None:
    holder: Any = ray.remote(Holder).options(num_cpus=8).remote()
    ray.get(holder.there.remote())
    work = pa.table({"clip": [1]})
    with pytest.raises(
        ProPhyError, match=r"^clips: nothing moved for \d+ s, and .* no room for 1 x Count; was"
    ):
        complete(lambda: work, run)
    ray.kill(holder)
