"""What a checkpoint of a run is judged by: losses of held-out clips, and sample videos. Knows no Ray."""

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from pipelines.config import Config
from pipelines.generation.generate import video_spec
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import PhysicsSpec
from pipelines.layout import EVALUATION_FILE, SAMPLES_FOLDER, TENSORBOARD_FOLDER, checkpoint_name
from pipelines.training.checkpoint_places import open_checkpoints
from pipelines.training.data import build_held_out_dataset
from pipelines.training.export import export_branch
from pipelines.training.metrics import mean_losses, total_loss
from pipelines.training.samples import describe_held_out
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.placement import Placement
from prophy.backbones.pretrained import load_experts, load_trained_expert, takes_images
from prophy.device import autocast, default_device
from prophy.evaluation.pictures import heat_overlay
from prophy.models.acceleration import accelerate
from prophy.models.control import PhysicsTrace
from prophy.sheets import film_sheet
from prophy.taxonomy import index_of, load_taxonomy
from prophy.training.cache import PriorCache
from prophy.training.data import PriorDataset, SemanticBatch, TrainBatch
from prophy.training.module import LossOutput, ProPhyTrainModule
from prophy.video import write_video

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # places in the timestep's distribution at which losses are measured

_COLUMNS = 6  # frames of a video in its picture


def evaluate(config: Config, cache: PriorCache, root: Path, step: int) -> None:
    """Measures the checkpoint of `step` and makes its samples; the rest is as in `watcher.evaluating`."""
    train = config.train
    with (
        tempfile.TemporaryDirectory() as scratch,
        SummaryWriter(str(root / TENSORBOARD_FOLDER / "evaluation")) as board,
    ):
        model = Path(scratch) / "model"
        with open_checkpoints(config.checkpoints).open(step) as checkpoint:
            export_branch(checkpoint, model)
        losses = held_out_losses(config, cache, model) if train.num_held_out else {}
        held = describe_held_out(config, cache)
        for name, value in losses.items():
            board.add_scalar(name, value, step)
        if train.sample_prompts:
            folder = root / SAMPLES_FOLDER / checkpoint_name(step)
            for index, sheet in enumerate(_make_samples(config, model, folder)):
                board.add_image(f"sample/{index}", sheet, step, dataformats="HWC")
    with (root / EVALUATION_FILE).open("a") as file:
        clips = {} if held is None else {"held_out": held}
        file.write(json.dumps({"step": step, **clips, **losses}) + "\n")


@torch.no_grad()
def held_out_losses(config: Config, cache: PriorCache, model: Path) -> dict[str, float]:
    """Mean losses of the held-out clips with the branch in `model`, each at all `QUANTILES`.

    Noise and timesteps are the same every time, so that checkpoints differ by what they learnt alone.
    """
    backbone, train, device = config.backbone, config.train, default_device()
    family, model_name = FAMILIES[backbone.family], (backbone.family, backbone.pretrained, backbone.revision)
    expert = load_trained_expert(*model_name, train.expert)
    others = [other.component for other in load_experts(*model_name).values() if other != expert]
    pipeline = load_pipeline(
        backbone.family,
        backbone.pretrained,
        backbone.revision,
        getattr(torch, backbone.dtype),
        model,
        Placement(device),
        **dict.fromkeys([*family.encoders, *others]),
    )
    [transformer] = pipeline.transformers
    accelerate(transformer, backbone.attention, backbone.compile)
    dataset, num_samples = build_held_out_dataset(config, cache)
    module = ProPhyTrainModule(
        transformer,
        family.classes().objective.from_scheduler(
            pipeline.scheduler.config, expert.trained_levels(train.noise_levels)
        ),
        cache.null_text(),
        train.loss_weights,
        train.reduction,
        train.alignment,
        num_samples,  # micro-batches of the one step
        takes_images(*model_name) == "first_latent",
    ).to(device)
    # All clips, each at all quantiles, are one global batch: load is balanced, and pairs are made, over all.
    batches = partial(_batches, dataset, num_samples, device)
    semantic = SemanticBatch.join([dataset[index][1] for index in range(num_samples)]).to(device)
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
        with torch.autocast("cpu", enabled=False):  # also where a forward pass asks for the next
            [batch], _ = dataset[index]
        for quantile in QUANTILES:
            at = torch.full_like(batch.timestep_quantile, quantile)
            yield replace(batch, timestep_quantile=at).to(device)


def _make_samples(config: Config, model: Path, folder: Path) -> Iterator[np.ndarray]:
    """Writes a video per prompt and a picture of it with the maps of what that names; yields the pictures."""
    sampler = VideoSampler(config.model_copy(update={"checkpoint": str(model)}))
    physics, taxonomy = config.physics, load_taxonomy(config.taxonomy)
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(config.train.sample_prompts):
        trace = PhysicsTrace() if physics.num_semantic_experts and physics.num_refinement_experts else None
        video = video_spec(config, prompt, PhysicsSpec() if trace else None)
        frames = sampler.sample(video, trace=trace)
        write_video(folder / f"{index}.mp4", frames, video.fps)
        rows = {prompt: frames}
        if trace is not None and trace.phenomenon_maps is not None:
            named = taxonomy.named_in(prompt, trace.phenomena)
            for name in named:
                map_ = trace.phenomenon_maps[0, ..., index_of(name, trace.phenomena)].numpy()
                rows[f"where {name} acts"] = heat_overlay(frames, map_, "tokens")
            if not named:
                rows = {f"{prompt} (names no phenomenon)": frames}
        sheet = film_sheet(rows.items(), _COLUMNS, scale=1)
        sheet.save(folder / f"{index}.png")
        yield np.asarray(sheet)
