"""What each worker of training runs: the steps, their metrics, the checkpoints.

What a step draws depends on the number of the step and on the samples in the cache alone.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pipelines.config import Config, TrainConfig
from pipelines.layout import BEGUN_FILE, STOP_FILE, RunFolder
from pipelines.metrics import TrainingMetrics
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import open_checkpoints
from pipelines.training.data import build_dataset, clip_shapes, read_ahead
from pipelines.training.engine import (
    Ema,
    begin_save,
    fragments,
    initialize,
    load_optimizer,
    optimizer_step,
    placement,
    set_learning_rate,
    whole_shape,
)
from pipelines.training.metrics import MetricsLog, StepClock, mean_losses, peak_memory
from pipelines.training.model import build_module, share_samples
from pipelines.training.record import never_trained_on
from pipelines.training.samples import describe_samples, held_out_videos
from pipelines.training.saving import EveryRankError, Save, latest_on_every_rank, writing
from prophy.backbones.families import FAMILIES
from prophy.device import default_device, has_bfloat16, peak_flops
from prophy.errors import ProPhyError
from prophy.models.acceleration import check_attention
from prophy.models.checkpoint import lora_config
from prophy.models.eight_bits import keep_in
from prophy.models.stored import local_folder
from prophy.training.cache import PriorCache
from prophy.training.cost import count_flops
from prophy.training.data import TrainBatch
from prophy.training.module import LossOutput, ProPhyTrainModule

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 2.0  # whether nodes go away: every worker waits milliseconds for Ray's answer


def train_loop_per_worker(loop_config: dict[str, Any]) -> str | int | None:
    """What each worker runs: from the frozen backbone, or the last checkpoint, to that of the last step.

    Args:
        loop_config: the arguments of `build_trainer`.

    Returns:
        What the user must mend, if that ended training: such errors are not worth a restart by Ray. Or the
        most workers to start again with, where as many as Ray found room for do not divide the batch.
    """
    config, found = loop_config["config"], ray.train.get_context().get_world_size()
    usable = next(count for count in range(found, 0, -1) if config.train.shares_batch(count))
    if usable < found:
        return usable
    if found < config.train.num_workers and ray.train.get_context().get_world_rank() == 0:
        logger.warning("%d of %d workers have room: the steps take longer", found, config.train.num_workers)
    train = config.train.model_copy(update={"num_workers": found})
    try:
        _train(loop_config | {"config": config.model_copy(update={"train": train})})
    except EveryRankError as error:
        return str(error)
    return None


def _train(loop_config: dict[str, Any]) -> None:
    config, cache = loop_config["config"], loop_config["cache"]
    train, root = config.train, RunFolder(config.run_dir).training
    rank, device = ray.train.get_context().get_world_rank(), default_device()
    begun = root / BEGUN_FILE
    with writing(f"remove {begun}"):  # of the workers before a restart
        if rank == 0:
            begun.unlink(missing_ok=True)
    precision = _precision(config, device)

    # 1. Data and model, as the last checkpoint left it
    dataset, store = build_dataset(config, cache, rank), open_checkpoints(config.checkpoints)
    samples = describe_samples(config, cache)
    with latest_on_every_rank(store, loop_config["sound"]) as checkpoint:
        engine, ema, flops = _load(config, cache, rank, checkpoint)
        start = None if train.start_from is None else local_folder(train.start_from)
        before = None if checkpoint is None else checkpoint.run
        unseen = never_trained_on(held_out_videos(config, cache), before, start)
    first_step = engine.global_steps
    log = None
    if rank == 0:
        if train.precision == "bf16" and precision == torch.float32:
            logger.warning(
                "this CPU has no bfloat16: training computes in fp32, whatever train.precision says"
            )
        peak = peak_flops(device, precision)
    with writing("write the metrics"):
        if rank == 0:
            log = MetricsLog(root, first_step, train, flops, peak)
            shown = TrainingMetrics(config.run_dir)

    # 2. Steps; a process of its own reads ahead
    loader = read_ahead(dataset, range(first_step, train.num_steps))
    clock = StepClock()

    def begin() -> Save:
        transformer = engine.module.transformer
        run = {"backbone": loop_config["backbone"], "physics": transformer.config["physics"]}
        run |= {"lora": lora_config(transformer), "samples": samples, "num_steps": train.num_steps}
        run["held_out"] = unseen
        return begin_save(engine, ema, store, run)

    saves = _Saves(train, first_step, root / STOP_FILE if rank == 0 else None, begin)
    for step, (batches, semantic) in enumerate(clock.waiting_for(loader), start=first_step + 1):
        if step == first_step + 1:
            with writing(f"write {begun}"):
                if rank == 0:
                    begun.touch()
        outputs, learning_rate = [], set_learning_rate(engine, train)
        load, later = None, [batch.to(device) for batch in batches[1:]]
        for index, batch in enumerate(batches):
            if index and saves.look(step - 1):  # what the step has added up so far is dropped
                return
            boundary = engine.is_gradient_accumulation_boundary()
            with clock("forward"):
                output = engine(batch.to(device), semantic.to(device) if boundary else None, load, later)
            load, later = output.expert_load, []
            with clock("backward"):
                engine.backward(output.loss)
            with clock("optimizer"):
                gradient_norm = optimizer_step(engine)
            outputs.append(output)
        assert gradient_norm is not None  # the last micro-batch ends the step
        if not math.isfinite(gradient_norm):
            raise _not_finite(outputs, batches, step, saves.commit())
        if ema is not None:
            with clock("optimizer"):
                ema.update(step)

        # 3. Metrics and checkpoints
        if log is not None:
            log.count(batches)
        if step % train.log_every == 0 or step == train.num_steps:
            metrics = _over_workers(mean_losses(outputs), "mean") | _over_workers(peak_memory(), "max")
            metrics |= {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
            seconds = clock.read()
            with writing(f"write the metrics of step {step}"):
                if log is not None:
                    shown.show(log.write(step, metrics, seconds))
        if saves.look(step, ended=True):
            return


def _load(
    config: Config, cache: PriorCache, rank: int, checkpoint: Checkpoint | None
) -> tuple[DeepSpeedEngine, Ema | None, dict[tuple[int, ...], int]]:
    """Model and optimiser as a checkpoint left them, or new ones; DeepSpeed shards what is trained.

    Returns:
        The engine; the moving average, if there is one; and, for rank 0 alone, `_flops_of_micro_batches`.
    """
    train = config.train
    module = build_module(config, cache.null_text(), cache.phenomena, checkpoint, placement(train))
    flops = _flops_of_micro_batches(module, cache, config) if rank == 0 else {}
    if train.sequence_parallel > 1:  # after the count, which one rank makes alone
        share_samples(module.transformer, train.sequence_parallel)
    compiled = () if config.backbone.compile == "none" else module.transformer._repeated_blocks
    engine = initialize(module, train, compiled)
    if train.storage_dtype is not None:  # only now: DeepSpeed sends all weights once, which takes no 8 bits
        keep_in(getattr(torch, train.storage_dtype), module.transformer)
    ema = None if train.ema_decay is None else Ema(train.ema_decay, fragments(engine))
    if checkpoint is not None:
        load_optimizer(engine, ema, checkpoint)
    return engine, ema, flops


def _precision(config: Config, device: torch.device) -> torch.dtype:
    """What forward and backward passes compute in.

    Raises:
        EveryRankError: the attention that was asked for does not go with it, alike on every rank.
    """
    train = config.train
    precision = torch.bfloat16 if train.precision == "bf16" and has_bfloat16(device) else torch.float32
    try:
        check_attention(
            config.backbone.attention, device, precision, trains=True, shares=train.sequence_parallel > 1
        )
    except ProPhyError as error:
        raise EveryRankError(str(error)) from None
    return precision


class _Saves:
    """Which steps are saved: by number and time, before a node goes away, and before the run stops.

    Args:
        train: the configuration.
        first_step: the step that the run resumes from.
        stop_file: where rank 0 looks for it; None on the others.
        begin: begins to save what the last whole step made; a collective.
    """

    def __init__(
        self, train: TrainConfig, first_step: int, stop_file: Path | None, begin: Callable[[], Save]
    ) -> None:
        self._train, self._stop_file, self._begin = train, stop_file, begin
        self._committed = self._begun = first_step
        self._save: Save | None = None
        self._saved_at, self._asked, self._told = time.monotonic(), 0.0, False

    def look(self, step: int, ended: bool = False) -> bool:
        """Begins to save where that is due, and commits what every rank has written; a collective.

        The last checkpoint, and one that cannot wait, is committed at once.

        Args:
            step: number of whole steps taken.
            ended: whether the last one has just ended; else the next one is at work, and a step of a large
                model lasts longer than the notice that a node is taken away.

        Returns:
            Whether to stop.
        """
        train, now, stop_file = self._train, time.monotonic(), self._stop_file
        late = now - self._saved_at > train.save_every_s
        stop, ask, due, writes = _on_any_rank(
            stop_file is not None and stop_file.exists(),
            stop_file is not None and now - self._asked > _ASK_EVERY_S,
            stop_file is not None
            and ended
            and (late or step % train.save_every == 0 or step == train.num_steps),
            self._save is not None and not self._save.is_written,
        )
        # A node that goes away takes its worker along; Ray starts the others again, from what is saved now.
        leaving = ask and ray.train.get_preemption_info() is not None and not self._told
        if ask:
            self._asked = now
        at_once = stop or leaving or step == train.num_steps
        if due and writes and stop_file is not None and not at_once:
            logger.warning(
                "step %d waits to be saved until step %d is, for %.0f s by now; raise train.save_every",
                step,
                self._begun,
                now - self._saved_at,
            )
        if due or at_once or not writes:
            self.commit()
        if (due or stop or leaving) and step > self._begun:
            self._save, self._begun, self._saved_at = self._begin(), step, time.monotonic()
            if at_once:
                self.commit()
        self._told = self._told or leaving
        return stop

    def commit(self) -> int:
        """Commits what was begun, once it is written, and returns the newest that counts; a collective."""
        if self._save is not None:
            self._save.commit(self._train.num_to_keep)
            self._save, self._committed = None, self._begun
        return self._committed


def _on_any_rank(*flags: bool) -> list[bool]:
    """Which of them hold on some rank, on every rank."""
    joint = torch.tensor(flags, dtype=torch.int32, device=default_device())
    torch.distributed.all_reduce(joint, torch.distributed.ReduceOp.MAX)
    return joint.bool().tolist()


def _not_finite(
    outputs: list[LossOutput], batches: list[TrainBatch], step: int, saved: int
) -> EveryRankError:
    """What ends training where a step spoilt the parameters: names it, and the samples of such a loss.

    A collective: the norm of the gradient is the same on every rank.
    """
    own = [
        sample_id
        for batch, output in zip(batches, outputs, strict=True)
        if not output.loss.isfinite()
        for sample_id in batch.sample_ids
    ]
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    guilty = sorted({sample_id for ids in gathered for sample_id in ids})
    what = f"the loss of the samples {', '.join(guilty)}" if guilty else "the gradient"
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was saved before"
    advice = "train in another run_dir with a lower train.learning_rate"
    if saved:
        advice += ", where train.start_from may be what `prophy export` makes of that checkpoint"
    if guilty:
        advice += (
            "; or take the videos of these samples, which priors/index.parquet names, out of cache.input, "
            "run `prophy cache`, and then this command again"
        )
    return EveryRankError(f"{what} is not finite at step {step}; {kept}: {advice}")


def _flops_of_micro_batches(
    module: ProPhyTrainModule, cache: PriorCache, config: Config
) -> dict[tuple[int, ...], int]:
    """Operations of a micro-batch of each shape of latents in the cache."""
    text = {name: tuple(value.shape) for name, value in module.null_text.named_buffers()}
    size, cached = config.train.micro_batch_size, set(cache.shapes)
    return {
        shape.latents: count_flops(
            module.transformer,
            size,
            shape.latents,
            text | FAMILIES[config.backbone.family].image(module.transformer.config, shape.latents[1:]),
            (prod(shape.token_grid),) if module.takes_first_latent else (),
            whole_shape,
        )
        for shape in clip_shapes(config)
        if shape.latents in cached
    }


def _over_workers(
    values: Mapping[str, float | torch.Tensor], reduction: Literal["mean", "max"]
) -> dict[str, float]:
    """Mean or maximum of each value over all workers; NaN is nothing to align, as in `mean_losses`."""
    joint = torch.stack(
        [torch.as_tensor(value, device=default_device()).float() for value in values.values()]
    )
    if reduction == "max":
        torch.distributed.all_reduce(joint, torch.distributed.ReduceOp.MAX)
        return dict(zip(values, joint.tolist(), strict=True))
    sums = torch.stack([joint.nan_to_num(), joint.isnan()])
    torch.distributed.all_reduce(sums)
    num_workers = torch.distributed.get_world_size()
    means = (sums[0] / num_workers).where(sums[1] < num_workers, torch.nan)
    return {name: mean for name, mean in zip(values, means.tolist(), strict=True) if not math.isnan(mean)}
