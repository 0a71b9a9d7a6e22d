"""Trains the embedded transformer on simulated clips by flow matching, without any physics.

It does not know the Physical Branch. The VAE has been trained before.
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

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.device import autocast
from prophy.errors import ProPhyError
from prophy.evaluation.generated import Request, Sampling, make_videos
from prophy.pretraining.muon import Muon
from prophy.pretraining.recipe import (
    FPS,
    NUM_FRAMES,
    SIZE,
    Progress,
    fit,
    held_out_clips,
    round_to_bfloat16,
    set_learning_rate,
    training_clips,
    trapezoid,
)
from prophy.sandbox import contact_sheet
from prophy.tiny.pipeline import MAX_SEQUENCE_LENGTH, SCHEDULER, TRANSFORMER, write_pipeline
from prophy.training.objectives import FlowMatching

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_CLIPS_PER_FILE = 50

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
        num_captions: wordings of each clip that are drawn from.
        seed: decides weights, clips and draws.
        batch_size: clips in a step.
        learning_rate: Muon's and AdamW's.
        weight_decay: that of both optimisers.
        warmup_steps: steps until the learning rate is reached.
        decay_share: last share of the steps, in which it falls to zero.
        caption_dropout: share of captions that are replaced by the empty prompt.
        ema_decay: decay of the weights' moving average, which is what is kept.
        validate_every: steps between validations.
    """

    num_steps: int
    num_clips: int = 2000
    num_held_out: int = 64
    num_samples: int = 16
    num_captions: int = 2
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_share: float = 0.55
    caption_dropout: float = 0.1
    ema_decay: float = 0.995
    validate_every: int = 100


def pretrain_backbone(folder: Path, recipe: BackboneRecipe) -> Progress:
    """Encodes, trains, measures and saves; goes on where it was cut off.

    Reads `vae/` and writes `transformer/` (diffusers' layout, bfloat16), `transformer.json` (recipe and
    measurements) and `transformer.png` (videos of held-out captions) in `folder`; keeps `pipeline/` (that VAE
    and the text encoder, with an untrained transformer), `encodings/` and `transformer.pt` there.

    Raises:
        ProPhyError: the VAE has not been trained in this folder.
    """
    if not (folder / "vae").is_dir():
        raise ProPhyError(
            f"no VAE in {folder / 'vae'}; run `prophy pretrain vae` with the same run_dir first"
        )
    torch.manual_seed(recipe.seed)
    transformer = WanTransformer3DModel(**TRANSFORMER)
    _initialise(transformer)
    write_pipeline(folder / "pipeline", AutoencoderKLWan.from_pretrained(folder / "vae"), transformer)
    training, validation = _encode(folder, recipe)
    objective = FlowMatching(SCHEDULER["flow_shift"])

    matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    in_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in transformer.parameters() if id(parameter) not in in_muon]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=decay),
    ]
    average = EMAModel(transformer.parameters(), decay=recipe.ema_decay)

    def take_step(step: int) -> dict[str, float]:
        factor = trapezoid(step, recipe.num_steps, recipe.warmup_steps, recipe.decay_share)
        set_learning_rate(optimisers, rate * factor)
        loss = _losses(transformer, objective, **_draw(training, recipe, step)).mean()
        transformer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        average.step(transformer.parameters())
        measured = {"loss": loss.item()}
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.num_steps:
            average.store(transformer.parameters())
            average.copy_to(transformer.parameters())
            measured["validation"] = float(_validate(transformer, objective, validation, recipe).mean())
            average.restore(transformer.parameters())
        return measured

    state = {"transformer": transformer, "average": average, "muon": optimisers[0], "adamw": optimisers[1]}
    progress = fit(take_step, state, folder / "transformer.pt", recipe.num_steps)

    average.copy_to(transformer.parameters())
    round_to_bfloat16(transformer)
    losses = _validate(transformer, objective, validation, recipe)
    seconds_per_video = _sample(folder, transformer.eval(), recipe)
    measured = {
        "recipe": asdict(recipe),
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


def _encode(folder: Path, recipe: BackboneRecipe) -> tuple[Tensors, Tensors]:
    """Training and held-out clips: `latents` `[N, C, T, H, W]` and `text` `[N, num_captions, L, D]`.

    In half precision, encoded on first use, file by file. Training has `empty`, the empty prompt's text, too.
    """
    encoder = VideoEncoder(
        str(folder / "pipeline"), None, "float32", "bfloat16", MAX_SEQUENCE_LENGTH, family="wan"
    )
    clips = training_clips(folder / "clips", recipe.num_clips, recipe.seed)
    held_out = held_out_clips(recipe.num_held_out)
    (folder / "encodings").mkdir(exist_ok=True)
    files = []
    for start in range(0, recipe.num_clips, _CLIPS_PER_FILE):
        chosen = slice(start, start + _CLIPS_PER_FILE)
        rng = np.random.default_rng((recipe.seed, start))
        captions = [list(rng.choice(said, recipe.num_captions)) for said in clips.captions[chosen]]
        path = folder / "encodings" / f"{start:06d}.safetensors"
        files.append(_encode_once(path, encoder, clips.frames[chosen], captions))
        logger.info("encoded %d of %d clips", start + len(captions), recipe.num_clips)
    training = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    frames, captions = np.stack([clip.frames for clip in held_out]), [[clip.caption] for clip in held_out]
    validation = _encode_once(folder / "encodings" / "held_out.safetensors", encoder, frames, captions)
    return training | {"empty": encoder.encode_text([""])["prompt_embeds"][0]}, validation


def _encode_once(path: Path, encoder: VideoEncoder, frames: np.ndarray, captions: list[list[str]]) -> Tensors:
    if not path.exists():
        latents = torch.cat(
            [encoder.encode_video(frames[index : index + 4]) for index in range(0, len(frames), 4)]
        )
        text = torch.stack([encoder.encode_text(said)["prompt_embeds"] for said in captions])
        draft = path.with_suffix(".tmp")
        save_file({"latents": latents.half(), "text": text.half()}, draft)
        draft.replace(path)
    return load_file(path)


def _draw(training: Tensors, recipe: BackboneRecipe, step: int) -> dict[str, torch.Tensor]:
    """The batch of a step: clips, wordings, dropped captions, noise, and quantiles that are spread evenly."""
    rng = np.random.default_rng((recipe.seed, step))
    size = recipe.batch_size
    clips = torch.from_numpy(rng.integers(len(training["latents"]), size=size))
    wordings = torch.from_numpy(rng.integers(recipe.num_captions, size=size))
    latents, text = training["latents"][clips].float(), training["text"][clips, wordings].float()
    text[torch.from_numpy(rng.random(size) < recipe.caption_dropout)] = training["empty"]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    quantile = (rng.random() + np.arange(size) / size) % 1.0
    return {
        "latents": latents,
        "text": text,
        "noise": torch.randn(latents.shape, generator=generator),
        "quantile": torch.from_numpy(quantile).float().clamp(1e-4, 1 - 1e-4),
    }


def _losses(
    transformer: WanTransformer3DModel,
    objective: FlowMatching,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    quantile: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each clip, `[B]`."""
    timesteps = objective.timesteps(quantile)
    noisy = objective.add_noise(latents, noise, timesteps)
    with autocast(_CPU, "bfloat16"):
        prediction = transformer(noisy, timesteps, text, return_dict=False)[0]
    return ((prediction.float() - objective.target(latents, noise, timesteps)) ** 2).flatten(1).mean(1)


@torch.no_grad()
def _validate(
    transformer: WanTransformer3DModel, objective: FlowMatching, validation: Tensors, recipe: BackboneRecipe
) -> torch.Tensor:
    """Losses of held-out clips at fixed noise and evenly spread quantiles, `[N]`, the least noisy first."""
    latents, text = validation["latents"].float(), validation["text"][:, 0].float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(recipe.seed))
    quantile = (torch.arange(len(latents)) + 0.5) / len(latents)
    batches = zip(*(part.split(recipe.batch_size) for part in (latents, text, noise, quantile)), strict=True)
    return torch.cat([_losses(transformer, objective, *batch) for batch in batches])


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
