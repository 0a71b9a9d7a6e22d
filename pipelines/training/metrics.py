"""What training writes about itself: JSON lines, TensorBoard, a line of progress. Knows no Ray, no model."""

import json
import logging
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch.utils.tensorboard import SummaryWriter

from pipelines.config import TrainConfig
from pipelines.layout import METRICS_FILE, TENSORBOARD_FOLDER
from pipelines.training.json_lines import read_rows, write_rows
from prophy.training.data import TrainBatch
from prophy.training.module import LossOutput

Phase = Literal["data", "forward", "backward", "optimizer"]
_Mark = float | torch.cuda.Event
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class StepClock:
    """Seconds of each phase of this process's steps: on a GPU those of its work, which is not waited for."""

    def __init__(self) -> None:
        self._spans: list[tuple[Phase, _Mark, _Mark]] = []

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Times the block as part of `phase`."""
        start = _mark()
        yield
        self._spans.append((phase, start, _mark()))

    def waiting_for(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, whose arrival is timed as "data"."""
        iterator = iter(items)
        while True:
            with self("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[Phase, float]:
        """Seconds of each phase since it was last read; here alone it waits for the GPU."""
        seconds: dict[Phase, float] = {}
        for phase, start, end in self._spans:
            seconds[phase] = seconds.get(phase, 0.0) + _between(start, end)
        self._spans = []
        return seconds


class MetricsLog:
    """What one worker writes of all: a file with a JSON object per line, TensorBoard, and a line of progress.

    Args:
        folder: where these files lie.
        first_step: the step that the run resumes from; what was written of later ones is dropped.
        train: the configuration.
        flops: operations of a micro-batch, by the shape of its samples' latents.
        peak_flops: operations per second that one worker's device can do.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        train: TrainConfig,
        flops: Mapping[tuple[int, ...], int],
        peak_flops: float,
    ) -> None:
        self._train, self._flops, self._peak_flops = train, flops, peak_flops
        self._file = folder / METRICS_FILE
        write_rows(self._file, [row for row in read_rows(self._file) if row["step"] <= first_step])
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step + 1)
        self._last = (first_step, time.perf_counter())
        self._tokens = self._operations = 0
        if first_step:
            logger.info("resumed from step %d of %d", first_step, train.num_steps)

    def count(self, batches: Iterable[TrainBatch]) -> None:
        """Counts the work of a step, whose micro-batches have one shape on all workers."""
        for batch in batches:
            self._tokens += self._train.data_parallel_size * batch.target_mask[..., 0].numel()
            self._operations += self._train.data_parallel_size * self._flops[tuple(batch.latents.shape[1:])]

    def write(
        self, step: int, metrics: Mapping[str, float], seconds: Mapping[Phase, float]
    ) -> dict[str, float]:
        """Writes the metrics of `step`, with times and throughput since the step written before.

        Args:
            step: number of steps taken.
            metrics: what this step measured.
            seconds: time in each phase, since the step written before.

        Returns:
            The row of the file.
        """
        now = time.perf_counter()
        last_step, last_time = self._last
        self._last = (step, now)
        elapsed, steps = now - last_time, step - last_step
        speed = self._train.global_batch_size * steps / elapsed
        mfu = self._operations / elapsed / (self._train.num_workers * self._peak_flops)
        loss = total_loss(self._train, metrics)
        metrics = {
            "loss": loss,
            **metrics,
            "step_time_s": elapsed / steps,
            **{f"{phase}_time_s": value / steps for phase, value in seconds.items()},
            "samples_per_s": speed,
            "tokens_per_s": self._tokens / elapsed,
            "mfu": mfu,
        }
        self._tokens = self._operations = 0
        row = {"step": step, **metrics}
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        left = timedelta(seconds=round((self._train.num_steps - step) * elapsed / steps))
        logger.info(
            f"step {step}/{self._train.num_steps}  loss {loss:.4f}  diffusion {metrics['diffusion']:.4f}  "
            f"{speed:.2f} samples/s  MFU {mfu:.1%}  {left} left"
        )
        return row


def total_loss(train: TrainConfig, losses: Mapping[str, float]) -> float:
    """Eq. 6, of the losses that there are."""
    return losses["diffusion"] + sum(
        weight * losses[name] for name, weight in train.loss_weights if name in losses
    )


def mean_losses(outputs: list[LossOutput]) -> dict[str, torch.Tensor]:
    """Mean over micro-batches of every scalar but the loss, which is scaled for the engine's averaging.

    A vector's entries are named `vector/0`, `vector/1` and so on. An alignment is NaN where no micro-batch
    has anything to align; beside others, one that has nothing counts as 0, as in the loss.
    """
    means: dict[str, torch.Tensor] = {}
    for name in outputs[-1]:
        values = torch.stack([output[name] for output in outputs if name in output])
        if name in ("semantic_alignment", "token_alignment") and not values.isnan().all():
            values = values.nan_to_num()
        mean = values.mean(0)
        if name != "loss":
            entries = {f"{name}/{index}": value for index, value in enumerate(mean)} if mean.ndim else {}
            means |= entries or {name: mean}
    return means


def peak_memory() -> dict[str, float]:
    """Most memory that this process had so far, in GB: of the host, and of its GPU."""
    peaks = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if torch.cuda.is_available():
        peaks["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return peaks


def _mark() -> _Mark:
    """Now: of a GPU when it has come so far."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
