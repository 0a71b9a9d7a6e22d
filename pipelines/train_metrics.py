"""What training writes about itself: JSON lines, TensorBoard, a line of progress. Knows no Ray, no model."""

import json
import logging
import time
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipelines.config import TrainConfig

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

logger = logging.getLogger(__name__)


class MetricsLog:
    """What one worker writes of all: a file with a JSON object per line, TensorBoard, and a line of progress.

    Args:
        folder: of these files.
        first_step: the step that the run resumes from; what was written of later ones is dropped.
        train: the configuration.
    """

    def __init__(self, folder: Path, first_step: int, train: TrainConfig) -> None:
        self._train = train
        self._file = folder / METRICS_FILE
        if self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
            self._file.write_text("".join(kept))
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step + 1)
        self._last = (first_step, time.perf_counter())
        if first_step >= train.num_steps:
            logger.info("step %d of %d was reached before; nothing to train", first_step, train.num_steps)
        elif first_step:
            logger.info("resumed from step %d of %d", first_step, train.num_steps)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of `step`, with step time and throughput since the step written before."""
        now = time.perf_counter()
        last_step, last_time = self._last
        self._last = (step, now)
        step_time = (now - last_time) / (step - last_step)
        speed = self._train.global_batch_size / step_time
        terms = [weight * metrics[name] for name, weight in self._train.loss_weights if name in metrics]
        loss = metrics["diffusion"] + sum(terms)
        metrics = {"loss": loss, **metrics, "step_time_s": step_time, "samples_per_s": speed}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        left = timedelta(seconds=round((self._train.num_steps - step) * step_time))
        logger.info(
            f"step {step}/{self._train.num_steps}  loss {loss:.4f}  "
            f"diffusion {metrics['diffusion']:.4f}  {speed:.2f} samples/s  {left} left"
        )
