"""`prophy train`: trains the Physical Branch on the cache with Ray Train and DeepSpeed.

The same command resumes from the last checkpoint in the run folder, with as many workers as it now says:
what a step draws depends on the number of the step and on the samples in the cache alone.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from filelock import FileLock, Timeout
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.utils.data import DataLoader

from pipelines.cache import encodings_folder, priors_folder
from pipelines.checkpoint import (
    EveryRankError,
    latest,
    latest_on_every_rank,
    newest_run,
    set_damaged_aside,
    writing,
)
from pipelines.config import Config, TrainConfig
from pipelines.engine import (
    Ema,
    fragments,
    initialize,
    load_optimizer,
    optimizer_step,
    placement,
    save_checkpoint,
    set_learning_rate,
)
from pipelines.export import export_branch, writing_model
from pipelines.runtime import open_run, ray_session
from pipelines.train_data import build_dataset, describe_samples
from pipelines.train_evaluation import evaluation
from pipelines.train_metrics import MetricsLog, StepClock, mean_losses, peak_memory
from pipelines.train_model import build_module
from prophy.cost import count_flops
from prophy.data import PriorCache, TrainBatch
from prophy.device import has_bfloat16, peak_flops
from prophy.errors import ProPhyError
from prophy.models.checkpoint import lora_config, physics_config
from prophy.pretrained import check_unchanged, fingerprint, pinned_revision
from prophy.train_module import LossOutput, ProPhyTrainModule

MODEL_FOLDER = "model"

logger = logging.getLogger(__name__)

_NAME = "train"  # of Ray Train's run, and of its folder in the run folder
_STOP_FILE = "stop"  # in that folder: save, then leave
_ASK_EVERY_S = 2.0  # whether nodes go away: every worker waits milliseconds for Ray's answer


def run(config: Config) -> Path:
    """Trains to `train.num_steps`, from the last checkpoint if there is one.

    SIGTERM saves a checkpoint after the step at work, then ends the process.

    Returns:
        Folder of the trained branch.

    Raises:
        ProPhyError: no cache, or one that does not fit; the run folder belongs to another run, another
            process trains in it, or it cannot be written to; or a loss is not finite.
    """
    backbone = pin_backbone(config)
    pinned = _at_revision(config, backbone["revision"])
    cache = PriorCache(Path(priors_folder(pinned)), Path(encodings_folder(pinned)))
    compare_samples(pinned, cache)
    trainer = build_trainer(pinned, cache, backbone)
    root = open_run(config, "train") / _NAME
    with alone(root):
        last = set_damaged_aside(config.checkpoints)  # before one of them is evaluated
        with (
            ray_session(config),
            _stop_on_sigterm(root / _STOP_FILE) as stop,
            evaluation(pinned, cache, root),
        ):
            if last is not None and last.step >= config.train.num_steps:
                logger.info("step %d of %d was reached before", last.step, config.train.num_steps)
            else:
                mistake = trainer.fit().return_value  # type: ignore[attr-defined]  # mypy sees Ray Train V1
                if mistake is not None:
                    raise ProPhyError(mistake)
                if stop.exists():
                    logger.info("stopped on SIGTERM; the same command goes on")
                    raise SystemExit(128 + signal.SIGTERM)
                last = latest(config.checkpoints)
                assert last is not None
            model = config.run_dir / MODEL_FOLDER
            with writing_model(model):
                export_branch(last, model)
            logger.info("trained branch after %d steps: %s", last.step, model)
    return model


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the folder of training for one run: two would remove each other's unfinished checkpoints.

    Raises:
        ProPhyError: another run holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ProPhyError(
            f"another run trains in {root.parent}; wait for it, or choose another run_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stop_on_sigterm(flag: Path) -> Iterator[Path]:
    """Turns SIGTERM into a file that the workers look for after each step."""
    flag.parent.mkdir(parents=True, exist_ok=True)
    flag.unlink(missing_ok=True)
    previous = signal.signal(signal.SIGTERM, lambda *_: flag.touch())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)


def pin_backbone(config: Config) -> dict[str, str | None]:
    """`name`, `revision` and `fingerprint` of the backbone that every node, restart and resumption loads.

    The first start decides: a hub that moves on does not change what a run is trained on.

    Raises:
        ProPhyError: there is no such model, or the last checkpoint was trained on another one.
    """
    pretrained, newest = config.backbone.pretrained, newest_run(config.checkpoints)
    if newest is not None:
        folder, saved = newest
        check_unchanged(folder, saved["backbone"], pretrained)
        return saved["backbone"]
    revision = pinned_revision(pretrained, config.backbone.revision)
    return {"name": pretrained, "revision": revision, "fingerprint": fingerprint(pretrained, revision)}


def compare_samples(config: Config, cache: PriorCache) -> None:
    """Says where the cache has changed since the last checkpoint: it may, but the batches change with it."""
    newest, samples = newest_run(config.checkpoints), describe_samples(config, cache)
    # A checkpoint need not say it: the first ones did not.
    before = samples if newest is None else newest[1].get("samples", samples)
    if before != samples:
        logger.warning(
            "the cache has other samples to train on (%d) than at the last checkpoint (%d): from here on the "
            "batches are others than without that change",
            samples["number"],
            before["number"],
        )


def _at_revision(config: Config, revision: str | None) -> Config:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"revision": revision})})


def build_trainer(config: Config, cache: PriorCache, backbone: dict[str, str | None]) -> TorchTrainer:
    """The trainer: workers, and what each reserves. Reads the first step as a trial.

    Args:
        config: with the revision of `backbone`.
        cache: the samples.
        backbone: see `pin_backbone`.

    Raises:
        ProPhyError: the cache does not fit the configuration.
    """
    train = config.train
    _ = build_dataset(config, cache, rank=0)[0]
    gpus = {"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}
    return TorchTrainer(
        train_loop_per_worker,  # type: ignore[arg-type]  # Ray's annotation has no return value
        train_loop_config={"config": config, "cache": cache, "backbone": backbone},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": train.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=_NAME,
            storage_path=str(config.run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def train_loop_per_worker(loop_config: dict[str, Any]) -> str | None:
    """What each worker runs: from the frozen backbone, or the last checkpoint, to that of the last step.

    Args:
        loop_config: `config`, the opened `cache`, and the `backbone` that the trained branch will name.

    Returns:
        What the user must mend, if that ended training: such errors are not worth a restart by Ray.
    """
    try:
        _train(loop_config)
    except EveryRankError as error:
        return str(error)
    return None


def _train(loop_config: dict[str, Any]) -> None:
    config, cache = loop_config["config"], loop_config["cache"]
    train, root = config.train, config.run_dir / _NAME
    rank, device = ray.train.get_context().get_world_rank(), get_device()

    # 1. Data and model, as the last checkpoint left it; DeepSpeed shards what is trained
    dataset = build_dataset(config, cache, rank)
    samples = describe_samples(config, cache)
    checkpoint = latest_on_every_rank(config.checkpoints)
    module = build_module(config, cache.null_text_embeds(), checkpoint, placement(train))
    if rank == 0:
        flops = _flops_of_micro_batches(module, cache, train)
    engine = initialize(module, train)
    ema = None if train.ema_decay is None else Ema(train.ema_decay, fragments(engine))
    if checkpoint is not None:
        load_optimizer(engine, ema, checkpoint)
    first_step = engine.global_steps
    log = None
    if rank == 0:
        precision = torch.bfloat16 if train.precision == "bf16" else torch.float32
        if precision == torch.bfloat16 and not has_bfloat16(device):
            logger.warning(
                "this CPU has no bfloat16: training computes in fp32, whatever train.precision says"
            )
            precision = torch.float32
        peak = peak_flops(device, precision)
    with writing("write the metrics"):
        if rank == 0:
            log = MetricsLog(root, first_step, train, flops, peak)

    # 2. Steps; a process of its own reads ahead
    loader = DataLoader(dataset, batch_size=None, sampler=range(first_step, train.num_steps), num_workers=1)
    saved, preempted, asked, clock = first_step, False, 0.0, StepClock()
    for step, (batches, semantic) in enumerate(clock.waiting_for(loader), start=first_step + 1):
        outputs, learning_rate = [], set_learning_rate(engine, train)
        for batch in batches:
            boundary = engine.is_gradient_accumulation_boundary()
            with clock("forward"):
                output = engine(batch.to(device), semantic.to(device) if boundary else None)
            with clock("backward"):
                engine.backward(output.loss)
            with clock("optimizer"):
                gradient_norm = optimizer_step(engine)
            outputs.append(output)
        assert gradient_norm is not None  # the last micro-batch ends the step
        _check_finite(gradient_norm, outputs, batches, step, saved)
        if ema is not None:
            with clock("optimizer"):
                ema.update(step)

        # 3. Metrics and checkpoints
        if log is not None:
            log.count(batches)
        if step % train.log_every == 0 or step == train.num_steps:
            metrics = _over_workers(mean_losses(outputs), "mean") | _over_workers(peak_memory(), "max")
            metrics |= {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
            with writing(f"write the metrics of step {step}"):
                if log is not None:
                    log.write(step, metrics, clock.read())
        overdue = time.monotonic() - asked > _ASK_EVERY_S
        stop, ask = _from_rank_0(rank == 0 and (root / _STOP_FILE).exists(), overdue)
        # A node that goes away takes its worker along; Ray starts the others again, from what is saved now.
        leaving = ask and ray.train.get_preemption_info() is not None and not preempted
        if ask:
            asked = time.monotonic()
        if step % train.save_every == 0 or step == train.num_steps or stop or leaving:
            transformer = engine.module.transformer
            run = {"backbone": loop_config["backbone"], "physics": physics_config(transformer)}
            run |= {"lora": lora_config(transformer), "samples": samples}
            save_checkpoint(engine, ema, config.checkpoints, run, train.num_to_keep)
            saved, preempted = step, preempted or leaving
        if stop:
            return


def _from_rank_0(*flags: bool) -> list[bool]:
    """Those of rank 0, on every rank."""
    joint = torch.tensor(flags, device=get_device())
    torch.distributed.broadcast(joint, src=0)
    return joint.tolist()


def _check_finite(
    gradient_norm: float, outputs: list[LossOutput], batches: list[TrainBatch], step: int, saved: int
) -> None:
    """Ends training where a step spoilt the parameters; the norm is the same on every rank.

    Raises:
        EveryRankError: the gradient is not finite; names the step and the samples whose loss is not.
    """
    if math.isfinite(gradient_norm):
        return
    own = [
        sample_id
        for batch, output in zip(batches, outputs, strict=True)
        if not output.loss.isfinite()
        for sample_id in batch.sample_ids
    ]
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    guilty = sorted(sample_id for ids in gathered for sample_id in ids)
    what = f"the loss of the samples {', '.join(guilty)}" if guilty else "the gradient"
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was saved before"
    advice = "train in another run_dir with a lower train.learning_rate"
    if saved:
        advice += ", where train.start_from may be what `prophy export` makes of that checkpoint"
    if guilty:
        advice += (
            "; or cache without the videos of these samples, which priors/index.parquet names, into another "
            "cache.output and run the same command with it"
        )
    raise EveryRankError(f"{what} is not finite at step {step}; {kept}: {advice}")


def _flops_of_micro_batches(
    module: ProPhyTrainModule, cache: PriorCache, train: TrainConfig
) -> dict[tuple[int, ...], int]:
    """Operations of a micro-batch of each shape of latents in the cache."""
    text_length = len(module.null_text_embeds)
    return {
        shape: count_flops(module.transformer, train.micro_batch_size, shape, text_length)
        for shape in set(cache.shapes.values())
    }


def _over_workers(
    values: Mapping[str, float | torch.Tensor], reduction: Literal["mean", "max"]
) -> dict[str, float]:
    """Mean or maximum of each value over all workers."""
    joint = torch.stack([torch.as_tensor(value, device=get_device()).float() for value in values.values()])
    operation = torch.distributed.ReduceOp.SUM if reduction == "mean" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(joint, operation)
    if reduction == "mean":
        joint /= torch.distributed.get_world_size()
    return dict(zip(values, joint.tolist(), strict=True))
