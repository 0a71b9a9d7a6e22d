"""Trains the embedded transformer on simulated clips by flow matching, without any physics.

It is trained as Wan2.2-TI2V is: each token has a timestep, and in a share of the samples the first latent
frame is given without noise, so that one set of weights makes videos of a text alone and of a first frame.
It does not know the Physical Branch. VAE and text encoder have been trained before.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.device import autocast
from prophy.errors import ProPhyError
from prophy.evaluation.generated import Request, Sampling, make_videos
from prophy.pretraining.muon import Muon
from prophy.pretraining.recipe import (
    FPS,
    MADE_FROM,
    NUM_FRAMES,
    SIZE,
    Progress,
    TrainingClips,
    fit,
    folder_sha256,
    held_out_clips,
    made_from,
    round_to_bfloat16,
    set_learning_rate,
    simulator,
    training_clips,
    trapezoid,
)
from prophy.pretraining.text import say
from prophy.sandbox import Part, contact_sheet
from prophy.tiny.pipeline import MAX_SEQUENCE_LENGTH, SCHEDULER, TRANSFORMER, write_pipeline
from prophy.training.objectives import FlowMatching

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_CLIPS_PER_FILE = 50
_PURE_NOISE = 0.96

SAMPLING = Sampling(num_frames=NUM_FRAMES, fps=FPS, size=SIZE, num_inference_steps=25, guidance_scale=5.0)
"""How the embedded default makes videos; the preset `tiny` says the same."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    """How the transformer is trained.

    Attributes:
        num_steps: optimiser steps.
        num_clips: simulated clips to train on.
        num_held_out: clips to validate on.
        num_samples: held-out captions to make videos of.
        start_from: folder of a transformer to begin with; None for new weights.
        seed: decides weights, clips and draws.
        batch_size: clips in a step.
        micro_batch_size: clips in a forward pass.
        learning_rate: Muon's and AdamW's.
        weight_decay: that of both optimisers.
        warmup_steps: steps until the learning rate is reached.
        decay_share: last share of the steps, in which it falls to zero.
        paraphrased: share of clauses that no caption holds, as in the text encoder's training.
        caption_dropout: share of captions that are replaced by the empty prompt.
        first_frame: share of samples whose first latent frame is given.
        pure_noise: share of samples with a sigma above 0.96, where the text alone says what is where. Half of
            the others are spread as the sampler's steps, half as the objective spreads them.
        ema_decay: decay of the weights' moving average, which is what is kept.
        validate_every: steps between validations.
    """

    num_steps: int
    num_clips: int = 2000
    num_held_out: int = 64
    num_samples: int = 16
    start_from: Path | None = None
    seed: int = 0
    batch_size: int = 16
    micro_batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_share: float = 0.55
    paraphrased: float = 0.4
    caption_dropout: float = 0.1
    first_frame: float = 1 / 3
    pure_noise: float = 0.2
    ema_decay: float = 0.995
    validate_every: int = 100


def pretrain_backbone(folder: Path, recipe: BackboneRecipe) -> Progress:
    """Encodes, trains, measures and saves; goes on where it was cut off.

    Reads `vae/` and `text_encoder/`, and writes `transformer/` (diffusers' layout, bfloat16),
    `transformer.json` (recipe and measurements) and `transformer.png` (videos of held-out captions) in
    `folder`; keeps `pipeline/` (these three, the transformer untrained), `clips/`, `encodings/` and
    `transformer.pt` there.

    Raises:
        ProPhyError: the VAE or the text encoder has not been trained in this folder, or training began with
            others, or with another sandbox.
    """
    transformer = _begin(folder, recipe)
    encoder = VideoEncoder(
        str(folder / "pipeline"), None, "float32", "bfloat16", MAX_SEQUENCE_LENGTH, family="wan"
    )
    clips = training_clips(folder / "clips", recipe.num_clips, recipe.seed)
    latents, validation = _encode(folder, clips, encoder, recipe)
    objective = FlowMatching(SCHEDULER["flow_shift"])

    optimisers = _optimisers(transformer, recipe)
    average = EMAModel(transformer.parameters(), decay=recipe.ema_decay)

    def take_step(step: int) -> dict[str, float]:
        factor = trapezoid(step, recipe.num_steps, recipe.warmup_steps, recipe.decay_share)
        set_learning_rate(optimisers, recipe.learning_rate * factor)
        batch = _draw(latents, clips.parts, encoder, objective, recipe, step)
        transformer.zero_grad()
        losses = []
        for part in _split(batch, recipe.micro_batch_size):
            loss = _losses(transformer, objective, **part).sum() / recipe.batch_size
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        average.step(transformer.parameters())
        measured = {"loss": sum(losses)}
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.num_steps:
            average.store(transformer.parameters())
            average.copy_to(transformer.parameters())
            measured["validation"] = float(_validate(transformer, objective, validation, recipe).mean())
            average.restore(transformer.parameters())
        return measured

    state = {"transformer": transformer, "average": average, "muon": optimisers[0], "adamw": optimisers[1]}
    sources = simulator() | {
        "VAE": folder_sha256(folder / "vae"),
        "text encoder": folder_sha256(folder / "text_encoder"),
    }
    progress = fit(take_step, state, folder / "transformer.pt", recipe.num_steps, sources)

    average.copy_to(transformer.parameters())
    round_to_bfloat16(transformer)
    losses = _validate(transformer, objective, validation, recipe)
    seconds_per_video = _sample(folder, transformer.eval(), recipe)
    measured = {
        "recipe": asdict(recipe) | {"start_from": recipe.start_from and str(recipe.start_from)},
        "seconds": progress.seconds,
        "cpu_seconds": progress.cpu_seconds,
        "parameters": transformer.num_parameters(),
        "validation": float(losses.mean()),
        "validation_by_noise": [float(third.mean()) for third in losses.tensor_split(3)],
        "seconds_per_video": seconds_per_video,
    }
    (folder / "transformer.json").write_text(json.dumps(measured, indent=2))
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    logger.info("validation %.4f, %.1f s per video", measured["validation"], seconds_per_video)
    return progress


def _begin(folder: Path, recipe: BackboneRecipe) -> WanTransformer3DModel:
    """The transformer before its first step; writes `pipeline/` with it and with the parts that it needs.

    Raises:
        ProPhyError: see `pretrain_backbone`.
    """
    for part in ("vae", "text_encoder"):
        if not (folder / part).is_dir():
            raise ProPhyError(
                f"no {part} in {folder / part}; run `prophy pretrain {part}` with the same run_dir first"
            )
    torch.manual_seed(recipe.seed)
    transformer = WanTransformer3DModel(**TRANSFORMER)
    if recipe.start_from is None:
        _initialise(transformer)
    else:
        earlier = WanTransformer3DModel.from_pretrained(recipe.start_from, dtype=torch.float32)
        transformer.load_state_dict(earlier.state_dict())
    write_pipeline(
        folder / "pipeline",
        AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder / "text_encoder"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        transformer,
    )
    return transformer


def _optimisers(transformer: WanTransformer3DModel, recipe: BackboneRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    in_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in transformer.parameters() if id(parameter) not in in_muon]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return [
        Muon(matrices, lr=rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=decay),
    ]


def _initialise(transformer: WanTransformer3DModel) -> None:
    """Predicts zero at first, through blocks that are open a little."""
    projection = transformer.condition_embedder.time_proj
    for parameter in (transformer.proj_out.weight, transformer.proj_out.bias, projection.bias):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(projection.weight, std=0.02)
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table *= 0.1
            block.scale_shift_table[:, [2, 5]] = 0.3  # the gates of self-attention and feed-forward


def _encode(
    folder: Path, clips: TrainingClips, encoder: VideoEncoder, recipe: BackboneRecipe
) -> tuple[torch.Tensor, Tensors]:
    """Training latents `[N, C, T, H, W]` in half precision, and what `_losses` takes of held-out clips.

    Clips are encoded on first use, file by file, and again where they or the VAE changed.
    """
    sources = {"VAE": folder_sha256(folder / "vae"), "clips": (folder / "clips" / MADE_FROM).read_text()}
    made_from(folder / "encodings", {**sources, "held out": recipe.num_held_out})
    latents = []
    for start in range(0, recipe.num_clips, _CLIPS_PER_FILE):
        path = folder / "encodings" / f"{start:06d}.safetensors"
        latents.append(_encode_once(path, encoder, clips.frames[start : start + _CLIPS_PER_FILE]))
        logger.info("encoded %d of %d clips", start + len(latents[-1]), recipe.num_clips)
    held_out = held_out_clips(recipe.num_held_out)
    frames = np.stack([clip.frames for clip in held_out])
    held = _encode_once(folder / "encodings" / "held_out.safetensors", encoder, frames).float()
    quantile = (torch.arange(len(held)) + 0.5) / len(held)
    validation = {
        "latents": held,
        "text": encoder.encode_text([clip.caption for clip in held_out])["prompt_embeds"].float(),
        "noise": torch.randn(held.shape, generator=torch.Generator().manual_seed(recipe.seed)),
        "timesteps": FlowMatching(SCHEDULER["flow_shift"]).timesteps(quantile),
        "given": torch.zeros(len(held), dtype=torch.bool),
    }
    return torch.cat(latents), validation


def _encode_once(path: Path, encoder: VideoEncoder, frames: np.ndarray) -> torch.Tensor:
    if not path.exists():
        latents = [encoder.encode_video(frames[index : index + 4]) for index in range(0, len(frames), 4)]
        draft = path.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents).half()}, draft)
        draft.replace(path)
    return load_file(path)["latents"]


def _draw(
    latents: torch.Tensor,
    parts: list[tuple[Part, ...]],
    encoder: VideoEncoder,
    objective: FlowMatching,
    recipe: BackboneRecipe,
    step: int,
) -> Tensors:
    """The batch of a step: clips, wordings, dropped captions, noise, timesteps and given first frames."""
    rng = np.random.default_rng((recipe.seed, step))
    size = recipe.batch_size
    chosen = rng.integers(len(latents), size=size)
    captions = [
        "" if rng.random() < recipe.caption_dropout else say(parts[index], rng, recipe.paraphrased).text
        for index in chosen
    ]
    x_0 = latents[torch.from_numpy(chosen)].float()
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return {
        "latents": x_0,
        "text": encoder.encode_text(captions)["prompt_embeds"].float(),
        "noise": torch.randn(x_0.shape, generator=generator),
        "timesteps": _timesteps(objective, recipe, rng),
        "given": torch.from_numpy(rng.random(size) < recipe.first_frame),
    }


def _timesteps(objective: FlowMatching, recipe: BackboneRecipe, rng: np.random.Generator) -> torch.Tensor:
    """Timesteps `[B]`, whose quantiles are spread evenly over the batch."""
    size = recipe.batch_size
    quantile = torch.from_numpy(rng.permutation((rng.random() + np.arange(size) / size) % 1.0)).float()
    quantile = quantile.clamp(1e-4, 1 - 1e-4)
    sampler = objective.shift * quantile / (1 + (objective.shift - 1) * quantile)
    pure = _PURE_NOISE + (1 - _PURE_NOISE) * quantile
    kind = torch.from_numpy(rng.random(size))
    others = torch.where(
        kind < (1 + recipe.pure_noise) / 2,
        sampler * objective.num_train_timesteps,
        objective.timesteps(quantile),
    )
    return torch.where(kind < recipe.pure_noise, pure * objective.num_train_timesteps, others)


def _split(batch: Tensors, size: int) -> list[Tensors]:
    parts = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def _losses(
    transformer: WanTransformer3DModel,
    objective: FlowMatching,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    given: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each clip, `[B]`: of all frames, but for the first where it is given."""
    noisy = objective.add_noise(latents, noise, timesteps)
    known = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool)
    known[:, 0] = given
    noisy = torch.where(known[:, None, :, None, None], latents, noisy)
    _, height, width = transformer.config.patch_size
    per_frame = (latents.shape[3] // height) * (latents.shape[4] // width)
    of_token = torch.where(known, 0.0, timesteps[:, None]).repeat_interleave(per_frame, dim=1)
    with autocast(_CPU, "bfloat16"):
        prediction = transformer(noisy, of_token, text, return_dict=False)[0]
    error = (prediction.float() - objective.target(latents, noise, timesteps)) ** 2
    return (error.mean((1, 3, 4)) * ~known).sum(1) / (~known).sum(1)


@torch.no_grad()
def _validate(
    transformer: WanTransformer3DModel, objective: FlowMatching, validation: Tensors, recipe: BackboneRecipe
) -> torch.Tensor:
    """Losses of held-out clips at fixed noise and evenly spread quantiles, `[N]`, the least noisy first."""
    batches = _split(validation, recipe.micro_batch_size)
    return torch.cat([_losses(transformer, objective, **batch) for batch in batches])


def _sample(folder: Path, transformer: WanTransformer3DModel, recipe: BackboneRecipe) -> float:
    """Writes `transformer.png`: videos of held-out captions; returns seconds per video."""
    pipeline: Any = load_pipeline(
        "wan", str(folder / "pipeline"), None, torch.float32, None, transformer=transformer
    )
    wanted = held_out_clips(recipe.num_samples)
    requests = [Request(clip.caption, clip.parts, recipe.seed + index) for index, clip in enumerate(wanted)]
    began = time.perf_counter()
    videos = list(make_videos(pipeline, requests, SAMPLING))
    seconds = time.perf_counter() - began
    shown = [replace(clip, frames=video) for clip, video in zip(wanted, videos, strict=True)]
    contact_sheet(shown, outlines=False).save(folder / "transformer.png")
    return seconds / len(wanted)
