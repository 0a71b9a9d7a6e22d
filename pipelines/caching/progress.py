"""Progress with an end in sight: of whatever comes one by one, and of a graph that ends in `WriteRows`.

Of such a graph, a table per stage follows.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import DataContext, Dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid

from pipelines.metrics import CachingMetrics
from pipelines.resources import StalledError, guard
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0  # where there is no terminal to draw a bar on

T = TypeVar("T")


@dataclass(frozen=True)
class StageReport:
    """What one stage of a graph did.

    Attributes:
        name: its callable's.
        rows: that it took.
        busy_s: seconds inside the callable, of all its workers together.
        workers: size of its pool.
        first_s: when its first task began, in seconds of Ray's clock.
        last_s: when its last task ended.
    """

    name: str
    rows: int
    busy_s: float
    workers: int
    first_s: float
    last_s: float


@dataclass(frozen=True)
class GraphReport:
    """What one graph did: rows written, videos or clips refused, seconds taken, its stages and its files.

    `stalled` says why it did not come to its end, if it did not.
    """

    written: int = 0
    failed: int = 0
    seconds: float = 0.0
    spilled_bytes: int = 0
    stages: list[StageReport] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    stalled: str = ""

    def __add__(self, later: "GraphReport") -> "GraphReport":
        """Sums two runs of a graph, one after the other; the stages and files are the later one's."""
        return GraphReport(
            self.written + later.written,
            self.failed + later.failed,
            self.seconds + later.seconds,
            self.spilled_bytes + later.spilled_bytes,
            later.stages,
            later.files,
        )

    @property
    def busiest(self) -> StageReport:
        """The stage that all others wait for: the one whose workers computed longest."""
        return max(self.stages, key=lambda stage: stage.busy_s / stage.workers)

    @property
    def span_s(self) -> float:
        """From the first task of the busiest stage to the last of all: loading its model is not in it."""
        return max(stage.last_s for stage in self.stages) - self.busiest.first_s

    def utilisation(self, stage: StageReport) -> float:
        """Seconds that each of the stage's workers was busy, as a share of `span_s`."""
        return stage.busy_s / (stage.workers * self.span_s)


def show_progress(items: Iterable[T], name: str, total: int, unit: str, step: int = 1) -> Iterator[T]:
    """Passes items on, and shows how far they are: as a bar, or as a line of the log where nobody looks.

    Args:
        items: they come as they are done.
        name: what is done.
        total: how many units there are.
        unit: their name.
        step: units in an item; the last may have fewer.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    start = logged = time.monotonic()
    with Progress(*columns, speed_estimate_period=600) as progress:
        task = progress.add_task(name, total=total)
        for number, item in enumerate(items, 1):
            done = min(step * number, total)
            progress.update(task, completed=done)
            now = time.monotonic()
            if not progress.console.is_terminal and now - logged > _LOG_EVERY_S:
                logged = now
                left_s = (now - start) * (total - done) / done
                logger.info("%s: %d/%d %s, about %.0f s left", name, done, total, unit, left_s)
            yield item


def complete(left: Callable[[], pa.Table], run: Callable[[pa.Table], GraphReport]) -> GraphReport:
    """Runs a graph on what is left to do; one that a lost node leaves without room starts again on the rest.

    Args:
        left: the work list, anew at each call.
        run: runs the graph on a work list, with the room that the cluster has at each call.

    Raises:
        ProPhyError: there is no room, or two runs end without it and without a row in between.
    """
    done, work, in_vain = GraphReport(), left(), False
    while work:
        done += (report := run(work))
        if not report.stalled:
            break
        before, work = work, left()
        if in_vain and work.equals(before):
            raise ProPhyError(report.stalled)
        in_vain = work.equals(before)
        logger.warning("%s; starting again with the %d that are left", report.stalled, len(work))
    return done


def execute(graph: Dataset, name: str, total: int, workers: Mapping[str, int]) -> GraphReport:
    """Runs a graph to its end, or until something that it needs has no room in the cluster.

    Args:
        graph: its rows are counts of `WriteRows`.
        name: what it makes.
        total: rows of the work list, of which every row that arrives is a share.
        workers: size of each stage's pool, by the name of its callable.
    """
    guard(graph)
    _silence_ray_data()
    metrics = CachingMetrics(name)
    written, failed, share, files = 0, 0, 0.0, list[str]()
    start = logged = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, speed_estimate_period=600) as progress:
            task = progress.add_task(name, total=total)
            for counts in graph.iter_batches(batch_size=None, batch_format="pyarrow"):
                done = {column: pc.sum(counts[column]).as_py() for column in ("written", "failed")}
                metrics.count(done["written"], done["failed"])
                written += done["written"]
                failed += done["failed"]
                share += pc.sum(counts["share"]).as_py()
                files += pc.list_flatten(counts["files"]).to_pylist()
                now = time.perf_counter()
                text = f"{name}: {written / (now - start):.2f} clips/s, {failed} quarantined"
                progress.update(task, completed=share, description=text)
                if not progress.console.is_terminal and now - logged > _LOG_EVERY_S:
                    logged = now
                    left_s = (now - start) * (total - share) / share
                    logger.info("%s, %.0f%% done, about %.0f s left", text, 100 * share / total, left_s)
    except StalledError as error:
        seconds = time.perf_counter() - start
        return GraphReport(written, failed, seconds, files=files, stalled=f"{name}: {error}")
    seconds = time.perf_counter() - start
    spilled_bytes, stages = _stages(graph, workers)
    return GraphReport(written, failed, seconds, spilled_bytes, stages, files)


def print_stages(console: Console, name: str, report: GraphReport) -> None:
    """The table of a graph's stages."""
    grid = Grid("stage", "workers", "rows", "busy s", "utilisation", title=f"stages of {name}")
    for stage in report.stages:
        utilisation = f"{report.utilisation(stage):.0%}"
        grid.add_row(stage.name, str(stage.workers), str(stage.rows), f"{stage.busy_s:.1f}", utilisation)
    console.print(grid)


def _silence_ray_data() -> None:
    """Ray Data's bars count blocks per operator; ours counts clips."""
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _stages(graph: Dataset, workers: Mapping[str, int]) -> tuple[int, list[StageReport]]:
    """Bytes spilled, and the stages from first to last; Ray Data keeps them as a chain of parents."""
    summary = graph.get_stats_summary()
    spilled_bytes, stages = summary.global_bytes_spilled, list[StageReport]()
    names = {f"MapBatches({name})": name for name in workers}
    while True:
        for operator in summary.operators_stats:
            name = names.get(operator.operator_name)
            if name and operator.function_body_time:
                rows, busy_s = operator.total_input_num_rows or 0, operator.function_body_time.sum
                first_s, last_s = operator.earliest_start_time or 0.0, operator.latest_end_time or 0.0
                stages.append(StageReport(name, rows, busy_s, workers[name], first_s, last_s))
        if not summary.parents:
            assert stages, f"Ray Data calls its operators otherwise than {', '.join(names)}"
            return spilled_bytes, stages[::-1]
        [summary] = summary.parents
