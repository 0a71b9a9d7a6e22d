"""What a run is judged by while it trains: losses of held-out clips, and sample videos, of its checkpoints.

A Ray task of its own does it, beside the workers: they neither wait for it nor know of it.
"""

import json
import logging
import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import ray
import torch
from torch.utils.tensorboard import SummaryWriter

from pipelines.config import Config
from pipelines.generation.generate import spec
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import PhysicsSpec
from pipelines.layout import step_of
from pipelines.training.checkpoint import Checkpoint, committed, pin
from pipelines.training.data import build_held_out_dataset
from pipelines.training.export import export_branch
from pipelines.training.metrics import TENSORBOARD_FOLDER, mean_losses, read_rows, total_loss, write_rows
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.device import autocast, default_device
from prophy.evaluation.pictures import heat_overlay
from prophy.models.control import PhysicsTrace
from prophy.sheets import film_sheet
from prophy.taxonomy import PHENOMENA
from prophy.training.data import PriorCache, PriorDataset, SemanticBatch, TrainBatch
from prophy.training.module import LossOutput, ProPhyTrainModule
from prophy.video import write_video

EVALUATION_FILE = "evaluation.jsonl"
SAMPLES_FOLDER = "samples"
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timestep's distribution, at which losses are measured

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_MAPS_SHOWN = 3  # of the phenomena that act most
_COLUMNS = 6  # frames of a video in its picture


@contextmanager
def evaluation(config: Config, cache: PriorCache, root: Path) -> Iterator[None]:
    """Evaluates the newest checkpoint, then the one that is the newest by then, and at the end the last.

    Where nothing is held out and no sample is asked for, it does nothing. A failure is logged, and the run
    goes on. After an error in the block no more is evaluated.

    Args:
        config: the run's.
        cache: its samples.
        root: folder of the results: `evaluation.jsonl`, `samples/`, and `tensorboard/evaluation/`.
    """
    if not (config.train.num_held_out or config.train.sample_prompts):
        yield
        return
    ended, failed = threading.Event(), threading.Event()
    rows = read_rows(root / EVALUATION_FILE)
    write_rows(root / EVALUATION_FILE, rows)  # without a line that a kill cut short
    steps = [row["step"] for row in rows]
    watcher = threading.Thread(target=_watch, args=(config, cache, root, steps, ended, failed), daemon=True)
    watcher.start()
    try:
        yield
        ended.set()
        watcher.join()
    except BaseException:
        failed.set()
        raise


def evaluate(config: Config, cache: PriorCache, root: Path, folder: Path) -> None:
    """Measures the checkpoint in `folder`, and makes its samples; the other arguments as in `evaluation`."""
    checkpoint = Checkpoint(folder)
    step, train = checkpoint.step, config.train
    with (
        tempfile.TemporaryDirectory() as scratch,
        SummaryWriter(str(root / TENSORBOARD_FOLDER / "evaluation")) as board,
    ):
        model = Path(scratch) / "model"
        export_branch(checkpoint, model)
        losses = held_out_losses(config, cache, model) if train.num_held_out else {}
        for name, value in losses.items():
            board.add_scalar(name, value, step)
        if train.sample_prompts:
            for index, sheet in enumerate(_make_samples(config, model, root / SAMPLES_FOLDER / folder.name)):
                board.add_image(f"sample/{index}", sheet, step, dataformats="HWC")
    with (root / EVALUATION_FILE).open("a") as file:
        file.write(json.dumps({"step": step, **losses}) + "\n")


@torch.no_grad()
def held_out_losses(config: Config, cache: PriorCache, model: Path) -> dict[str, float]:
    """Mean losses of the held-out clips with the branch in `model`, each at all `QUANTILES`.

    Noise and timesteps are the same every time, so that checkpoints differ by what they learnt alone.
    """
    backbone, train, device = config.backbone, config.train, default_device()
    pipeline = load_pipeline(
        backbone.family,
        backbone.pretrained,
        backbone.revision,
        getattr(torch, backbone.dtype),
        model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    dataset, num_samples = build_held_out_dataset(config, cache)
    module = ProPhyTrainModule(
        pipeline.transformer,
        FAMILIES[backbone.family].classes().objective.from_scheduler(pipeline.scheduler.config),
        cache.null_text_embeds(),
        train.loss_weights,
        train.reduction,
        gradient_accumulation_steps=num_samples,
    ).to(device)
    # All clips, each at all quantiles, are one global batch: load is balanced, and pairs are made, over all.
    batches = partial(_batches, dataset, num_samples, device)
    captions = [dataset[index][1] for index in range(num_samples)]
    semantic = SemanticBatch(
        torch.cat([each.encoder_hidden_states for each in captions]),
        torch.cat([each.phenomena for each in captions]),
    ).to(device)
    outputs: list[LossOutput] = []
    load: torch.Tensor | None = None
    later: Iterator[TrainBatch] = islice(batches(), 1, None)
    for batch in batches():
        last = len(outputs) == num_samples * len(QUANTILES) - 1
        with autocast(device, "bfloat16" if train.precision == "bf16" else None):
            outputs.append(module(batch, semantic if last else None, load, later))
        load, later = outputs[-1].expert_load, iter(())
    losses = {name: float(value) for name, value in mean_losses(outputs).items()}
    by_quantile = {
        f"diffusion/quantile_{quantile}": float(mean_losses(outputs[index :: len(QUANTILES)])["diffusion"])
        for index, quantile in enumerate(QUANTILES)
    }
    losses = {name: value for name, value in losses.items() if not math.isnan(value)} | by_quantile
    return {"loss": total_loss(train, losses), **losses}


def _batches(dataset: PriorDataset, num_samples: int, device: torch.device) -> Iterator[TrainBatch]:
    """Each sample at all `QUANTILES`, one at a time."""
    for index in range(num_samples):
        [batch], _ = dataset[index]
        for quantile in QUANTILES:
            at = torch.full_like(batch.timestep_quantile, quantile)
            yield replace(batch, timestep_quantile=at).to(device)


def _watch(
    config: Config,
    cache: PriorCache,
    root: Path,
    steps: list[int],
    ended: threading.Event,
    failed: threading.Event,
) -> None:
    """Evaluates until the run has ended or failed; what is in `steps` was evaluated before."""
    train, seen = config.train, set(steps)
    task = ray.remote(evaluate).options(
        num_cpus=train.evaluation_cpus, num_gpus=train.evaluation_gpus, max_retries=0
    )
    over = False
    best = best_step(config, root)
    pin(config.checkpoints, best=best)  # what a run that was killed was evaluating may go
    while not (over or failed.is_set()):
        over = ended.wait(_LOOK_EVERY_S)  # then one last look
        for folder in committed(config.checkpoints)[:1]:
            step = step_of(folder)
            if step in seen:
                continue
            seen.add(step)
            pin(config.checkpoints, best=best, evaluating=step)
            logger.info("evaluating step %d, as soon as there are the resources", step)
            try:
                ray.get(task.remote(config, cache, root, folder))
                best = best_step(config, root)
                kept = "; its held-out loss is the lowest so far" if step == best else ""
                logger.info("evaluated step %d: %s%s", step, root, kept)
            except Exception as error:
                if not failed.is_set():
                    logger.warning("step %d was not evaluated: %s", step, error)
            pin(config.checkpoints, best=best)


def best_step(config: Config, root: Path) -> int | None:
    """Step of the checkpoint with the lowest held-out loss (Eq. 6) of those that are still there, if any."""
    if not config.train.keep_best:
        return None
    steps = {step_of(folder) for folder in committed(config.checkpoints)}
    rows = [row for row in read_rows(root / EVALUATION_FILE) if row["step"] in steps and "loss" in row]
    best = min((row for row in rows if math.isfinite(row["loss"])), key=lambda row: row["loss"], default=None)
    return None if best is None else best["step"]


def _make_samples(config: Config, model: Path, folder: Path) -> Iterator[np.ndarray]:
    """Writes a video per prompt and a picture of it with its routing maps; yields the pictures."""
    sampler = VideoSampler(config.model_copy(update={"checkpoint": model}))
    physics = config.physics
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(config.train.sample_prompts):
        trace = PhysicsTrace() if physics.num_semantic_experts and physics.num_refinement_experts else None
        video = spec(config, prompt, PhysicsSpec() if trace else None)
        frames = sampler.sample(video, trace=trace)
        write_video(folder / f"{index}.mp4", frames, video.fps)
        rows = {prompt: frames}
        if trace is not None and trace.phenomenon_maps is not None:
            maps = trace.phenomenon_maps[0].numpy()
            strongest = maps.mean((0, 1, 2)).argsort()[::-1][:_MAPS_SHOWN]
            rows |= {str(PHENOMENA[number]): heat_overlay(frames, maps[..., number]) for number in strongest}
        sheet = film_sheet(rows, _COLUMNS, scale=1)
        sheet.save(folder / f"{index}.png")
        yield np.asarray(sheet)
