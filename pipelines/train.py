"""`prophy train`: trains the Physical Branch on the cache with Ray Train and DeepSpeed.

The same command resumes: Ray Train finds the last checkpoint in the run folder, and what a step draws
depends on the number of the step alone.
"""

import json
import logging
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from pipelines.cache import encodings_folder, priors_folder
from pipelines.config import BackboneConfig, Config, TrainConfig
from pipelines.engine import (
    backward_and_step,
    gathered_parameters,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from pipelines.runtime import open_run, ray_session
from prophy.backbones import BACKBONES, fingerprint, load_configs, load_pipeline
from prophy.data import BatchPlan, ClipShape, PriorCache, PriorDataset
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.train_module import LossOutput, ProPhyTrainModule

MODEL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

logger = logging.getLogger(__name__)

_NAME = "train"  # of Ray Train's run, and of its folder in the run folder


def run(config: Config) -> Path:
    """Trains to `train.num_steps`, from the last checkpoint if there is one.

    Returns:
        Folder of the trained branch.

    Raises:
        ProPhyError: no cache, or one that does not fit; or the run folder belongs to another run.
    """
    trainer = build_trainer(config)
    run_dir = open_run(config, "train")
    with ray_session(config):
        trainer.fit()
    return run_dir / MODEL_FOLDER


def build_trainer(config: Config) -> TorchTrainer:
    """The trainer: workers, what each reserves, where checkpoints go. Reads the first step as a trial.

    Raises:
        ProPhyError: the cache, or checkpoints that are there, do not fit the configuration.
    """
    train, backbone = config.train, config.backbone
    cache = PriorCache(Path(priors_folder(config)), Path(encodings_folder(config)))
    _ = build_dataset(config, cache, rank=0)[0]
    _check_num_workers(config)
    identity = {
        "name": backbone.pretrained,
        "revision": backbone.revision,
        "fingerprint": fingerprint(backbone.pretrained, backbone.revision),
    }
    gpus = {"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config, "cache": cache, "backbone": identity},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": train.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=_NAME,
            storage_path=str(config.run_dir),
            checkpoint_config=CheckpointConfig(num_to_keep=train.num_to_keep),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """What each worker runs: from the frozen backbone to the trained branch in the run folder.

    Args:
        loop_config: `config`, the opened `cache`, and the `backbone` that the trained branch will name.
    """
    config, cache = loop_config["config"], loop_config["cache"]
    train = config.train
    rank, device = ray.train.get_context().get_world_rank(), get_device()

    # 1. Data and model; DeepSpeed shards what is trained
    dataset = build_dataset(config, cache, rank)
    engine = initialize(build_module(config, cache.null_text_embeds()), train)

    # 2. The step that the last run ended with
    first_step = _resume(engine)
    log = MetricsLog(config.run_dir / _NAME, first_step, train) if rank == 0 else None

    # 3. Steps; a process of its own reads ahead
    loader = DataLoader(dataset, batch_size=None, sampler=range(first_step, train.num_steps), num_workers=1)
    for step, (batches, semantic) in enumerate(loader, start=first_step + 1):
        outputs, learning_rate = [], engine.get_lr()[0]
        for batch in batches:
            boundary = engine.is_gradient_accumulation_boundary()
            output = engine(batch.to(device), semantic.to(device) if boundary else None)
            gradient_norm = backward_and_step(engine, output.loss)
            outputs.append(output)

        # 4. Metrics and checkpoints
        if step % train.log_every == 0 or step == train.num_steps:
            losses = _mean_over_workers(outputs)
            if log is not None:
                log.write(step, losses | {"learning_rate": learning_rate, "gradient_norm": gradient_norm})
        if step % train.save_every == 0 or step == train.num_steps:
            _report_checkpoint(engine, config)

    # 5. The trained branch
    with gathered_parameters(engine):
        if rank == 0:
            folder = config.run_dir / MODEL_FOLDER
            save_branch(engine.module.transformer, folder, loop_config["backbone"])
            logger.info("trained branch after %d steps: %s", engine.global_steps, folder)


def build_dataset(config: Config, cache: PriorCache, rank: int) -> PriorDataset:
    """The share of worker `rank` in the cached samples.

    Raises:
        ProPhyError: the cache does not fit the configuration.
    """
    train = config.train
    return PriorDataset(
        cache,
        BatchPlan(cache.shapes, train.global_batch_size, train.seed),
        [
            _clip_shape(config.backbone.model_copy(update={"height": height, "width": width}))
            for height, width in config.backbone.frame_shapes
        ],
        micro_batch_size=train.micro_batch_size,
        rank=rank,
        world_size=train.num_workers,
        recipe=train.recipe,
        negatives=train.negatives,
        caption_dropout=train.caption_dropout,
        seed=train.seed,
    )


def build_module(config: Config, null_text_embeds: torch.Tensor) -> ProPhyTrainModule:
    """The backbone, frozen, with the Physical Branch in float32, and the losses around it.

    Args:
        config: of the run; its seed decides the parameters of a new branch.
        null_text_embeds: embedding of the empty prompt, `[L, D]`.

    Raises:
        ProPhyError: the branch to start from is of another backbone, or of another shape.
    """
    backbone, train = config.backbone, config.train
    family = BACKBONES[backbone.family]
    pipeline = load_pipeline(
        backbone.family,
        backbone.pretrained,
        backbone.revision,
        getattr(torch, backbone.dtype),
        train.start_from,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    physics = config.physics.model_dump() | {"latent_shape": list(_clip_shape(backbone).latents[1:])}
    if train.start_from is None:
        torch.manual_seed(train.seed)
        transformer = family.prophy_transformer.from_transformer(pipeline.transformer, **physics)
    else:
        transformer = pipeline.transformer
        for name, value in physics.items():
            if transformer.config[name] != value:
                raise ProPhyError(
                    f"the branch in {train.start_from} has {name} {transformer.config[name]}, and this run "
                    f"{value}; make them equal, or set train.start_from=null for a new branch"
                )
    transformer.physics_branch.float()
    transformer.freeze_backbone()
    return ProPhyTrainModule(
        transformer,
        family.objective.from_scheduler(pipeline.scheduler.config),
        null_text_embeds,
        train.loss_weights,
        train.reduction,
        train.gradient_accumulation_steps,
    )


def _clip_shape(backbone: BackboneConfig) -> ClipShape:
    """The clip that the configured backbone is trained on, from its configuration files alone."""
    family = BACKBONES[backbone.family]
    vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    size = family.latent_shape(backbone.num_frames, backbone.height, backbone.width, vae, transformer)
    return ClipShape(
        num_frames=backbone.num_frames,
        latents=(transformer["in_channels"], *size),
        token_grid=family.token_grid(size, transformer),
    )


def _check_num_workers(config: Config) -> None:
    """What DeepSpeed shards over some workers, it cannot load on more or fewer."""
    now = config.train.num_workers
    for folder in (config.run_dir / _NAME).glob("step-*"):
        saved_by = Checkpoint.from_directory(folder).get_metadata().get("num_workers", now)
        if saved_by != now:
            raise ProPhyError(
                f"the checkpoints in {config.run_dir} were saved by {saved_by} workers, and "
                f"train.num_workers is {now}; set it back, or choose another run_dir"
            )


def _resume(engine: DeepSpeedEngine) -> int:
    """Loads the last checkpoint, if there is one, and returns the step that it was saved after."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        load_checkpoint(engine, Path(folder))
    return engine.global_steps


def _report_checkpoint(engine: DeepSpeedEngine, config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(engine, Path(folder))
        checkpoint = Checkpoint.from_directory(folder)
        checkpoint.set_metadata({"num_workers": config.train.num_workers})
        step = engine.global_steps
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")


def _mean_over_workers(outputs: list[LossOutput]) -> dict[str, float]:
    """Mean of every scalar over the micro-batches of all workers."""
    names = [name for name in outputs[-1] if name != "loss"]  # which is scaled for the engine's averaging
    means = torch.stack(
        [torch.stack([output[name] for output in outputs if name in output]).mean() for name in names]
    )
    torch.distributed.all_reduce(means)
    return dict(zip(names, (means / torch.distributed.get_world_size()).tolist(), strict=True))


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
        loss = metrics["diffusion"] + sum(weight * metrics[name] for name, weight in self._train.loss_weights)
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
