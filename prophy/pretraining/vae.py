"""Trains the embedded VAE on simulated clips, first on crops around what happens, then on whole clips.

It does not know the transformer, or how a pipeline is put together.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from prophy.device import autocast
from prophy.pretraining.muon import Muon
from prophy.pretraining.recipe import (
    Progress,
    TrainingClips,
    fit,
    held_out_clips,
    round_to_bfloat16,
    set_learning_rate,
    simulator,
    training_clips,
    trapezoid,
)
from prophy.sandbox import SimulatedClip, contact_sheet
from prophy.tiny.pipeline import VAE

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_CLIPS_FOR_STATISTICS = 128
_CLIPS_ON_SHEET = 12


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """How the VAE is trained.

    Attributes:
        num_steps: optimiser steps.
        num_clips: simulated clips to train on.
        num_held_out: clips to measure on.
        seed: decides weights, clips and draws.
        learning_rate: Muon's and AdamW's.
        warmup_steps: steps until it is reached.
        decay_share: last share of the steps, in which it falls to zero.
        crops_share: first share of the steps, on crops; the others are on whole clips.
        crop_frames: frames of a crop, 4 n + 1.
        crop_size: its height and width.
        crop_batch_size: crops in a step.
        clip_batch_size: whole clips in a step.
        squared_weight: weight of the squared error, beside the absolute one.
        kl_weight: weight of the KL divergence from a standard normal; a tenth of it in the first 30 %.
    """

    num_steps: int
    num_clips: int = 2000
    num_held_out: int = 60
    seed: int = 0
    learning_rate: float = 8e-3
    warmup_steps: int = 10
    decay_share: float = 0.6
    crops_share: float = 0.78
    crop_frames: int = 9
    crop_size: int = 32
    crop_batch_size: int = 4
    clip_batch_size: int = 1
    squared_weight: float = 4.0
    kl_weight: float = 1e-4


def pretrain_vae(folder: Path, recipe: VaeRecipe) -> Progress:
    """Trains, measures and saves; goes on where it was cut off.

    Writes `vae/` (diffusers' layout, bfloat16), `vae.json` (recipe and measurements) and `vae.png` (held-out
    clips, each above its reconstruction) to `folder`; keeps `vae.pt` and `clips/` there.
    """
    clips = training_clips(folder / "clips", recipe.num_clips, recipe.seed)
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKLWan(**VAE)
    _initialise(vae)
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim >= 4 and parameter.shape[1] > 1]
    matrices = {id(kernel) for kernel in kernels}
    others = [parameter for parameter in vae.parameters() if id(parameter) not in matrices]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(kernels, lr=recipe.learning_rate),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def take_step(step: int) -> dict[str, float]:
        rate = recipe.learning_rate * trapezoid(
            step, recipe.num_steps, recipe.warmup_steps, recipe.decay_share
        )
        set_learning_rate(optimisers, rate)
        rng = np.random.default_rng((recipe.seed, step))
        share = step / recipe.num_steps
        batch = _crops(clips, recipe, rng) if share < recipe.crops_share else _whole_clips(clips, recipe, rng)
        loss, measured = _loss(vae, batch, recipe, recipe.kl_weight * (0.1 if share < 0.3 else 1.0), rng)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        return measured

    state = {"vae": vae, "muon": optimisers[0], "adamw": optimisers[1]}
    progress = fit(take_step, state, folder / "vae.pt", recipe.num_steps, simulator())

    vae.eval()
    round_to_bfloat16(vae)
    _measure_latents(vae, clips)
    held_out = held_out_clips(recipe.num_held_out)
    reconstructions = list(reconstruct(vae, (clip.frames for clip in held_out)))
    measured = {
        "recipe": asdict(recipe),
        "seconds": progress.seconds,
        "cpu_seconds": progress.cpu_seconds,
        "parameters": vae.num_parameters(),
        **reconstruction_quality(held_out, reconstructions),
    }
    (folder / "vae.json").write_text(json.dumps(measured, indent=2))
    pairs = [
        clip
        for truth, frames in zip(held_out[:_CLIPS_ON_SHEET], reconstructions, strict=False)
        for clip in (truth, replace(truth, frames=frames))
    ]
    contact_sheet(pairs, outlines=False).save(folder / "vae.png")
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    logger.info("PSNR %.1f dB, inside masks %.1f dB", measured["psnr_db"], measured["psnr_inside_masks_db"])
    return progress


def _initialise(vae: AutoencoderKLWan) -> None:
    """A narrow posterior, else it collapses at once; residual blocks that start small."""
    channels = vae.config.z_dim
    with torch.no_grad():
        vae.quant_conv.weight[:channels] *= 2.0
        vae.quant_conv.weight[channels:] *= 0.1
        vae.quant_conv.bias[channels:] = -6.0
        for name, module in vae.named_modules():
            if name.endswith(".conv2"):
                module.weight *= 0.1
                module.bias.zero_()


def _crops(clips: TrainingClips, recipe: VaeRecipe, rng: np.random.Generator) -> torch.Tensor:
    """Crops, most of them around a place where something happens: `[B, 3, T, H, W]` in [-1, 1]."""
    num_clips, num_frames, height, width = clips.masks.shape
    size = recipe.crop_size
    crops = []
    for index in rng.integers(num_clips, size=recipe.crop_batch_size):
        start = rng.integers(num_frames - recipe.crop_frames + 1)
        span = slice(start, start + recipe.crop_frames)
        places = np.argwhere(clips.masks[index, span].any(0))
        if len(places) and rng.random() < 0.85:
            centre = places[rng.integers(len(places))] + rng.integers(-size // 3, size // 3 + 1, 2)
            top, left = np.clip(centre - size // 2, 0, (height - size, width - size))
        else:
            top, left = rng.integers((height - size + 1, width - size + 1))
        crops.append(clips.frames[index, span, top : top + size, left : left + size])
    return _to_pixels(np.stack(crops))


def _whole_clips(clips: TrainingClips, recipe: VaeRecipe, rng: np.random.Generator) -> torch.Tensor:
    return _to_pixels(clips.frames[np.sort(rng.integers(len(clips.frames), size=recipe.clip_batch_size))])


def _to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 `[B, T, H, W, 3]` -> `[B, 3, T, H, W]` in [-1, 1]."""
    return torch.tensor(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1.0


@cache
def _precision() -> str | None:
    """What gradients are computed in.

    On a CPU with AMX, torch 2.13 gives NaN or crashes in the backward pass of small convolutions in bfloat16,
    such as `Conv3d(24, 24, 3)` and `Conv3d(48, 24, 1)` on frames of 64x64.
    """
    if not torch.cpu.get_capabilities().get("amx_tile", False):
        return "bfloat16"
    logger.warning(
        "this CPU has AMX, with which torch computes wrong gradients in bfloat16: the VAE is trained in "
        "float32, which takes longer"
    )
    return None


def _loss(
    vae: AutoencoderKLWan, pixels: torch.Tensor, recipe: VaeRecipe, kl_weight: float, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    with autocast(_CPU, _precision()):
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).mean()
    absolute, squared = (decoded - pixels).abs().mean(), ((decoded - pixels) ** 2).mean()
    loss = absolute + recipe.squared_weight * squared + kl_weight * kl
    return loss, {"l1": absolute.item(), "mse": squared.item(), "kl": kl.item()}


@torch.no_grad()
def _measure_latents(vae: AutoencoderKLWan, clips: TrainingClips) -> None:
    """Puts each channel's mean and standard deviation over training clips into the configuration."""
    means = []
    for frames in clips.frames[:_CLIPS_FOR_STATISTICS]:
        with autocast(_CPU, "bfloat16"):
            means.append(vae.encode(_to_pixels(frames[None])).latent_dist.mode().float())
    std, mean = torch.std_mean(torch.cat(means), dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Encodes and decodes videos, uint8 `[T, H, W, 3]` each."""
    for frames in videos:
        with autocast(_CPU, "bfloat16"):
            decoded = vae.decode(vae.encode(_to_pixels(frames[None])).latent_dist.mode()).sample[0].float()
        pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
        yield pixels.permute(1, 2, 3, 0).numpy()


def reconstruction_quality(
    clips: Sequence[SimulatedClip], reconstructions: Sequence[np.ndarray]
) -> dict[str, object]:
    """Mean PSNR over clips: of all pixels, inside any mask, and inside the mask of each phenomenon."""
    overall, inside, by_phenomenon = [], [], defaultdict(list)
    for clip, frames in zip(clips, reconstructions, strict=True):
        error = ((frames.astype(np.float32) - clip.frames) ** 2).mean(-1)
        overall.append(_psnr(error))
        inside.append(_psnr(error[np.any(list(clip.masks.values()), axis=0)]))
        for phenomenon, mask in clip.masks.items():
            if mask.any():
                by_phenomenon[str(phenomenon)].append(_psnr(error[mask]))
    return {
        "psnr_db": float(np.mean(overall)),
        "psnr_worst_clip_db": min(overall),
        "psnr_inside_masks_db": float(np.mean(inside)),
        "psnr_inside_mask_of_db": {name: float(np.mean(values)) for name, values in by_phenomenon.items()},
    }


def _psnr(squared_error: np.ndarray) -> float:
    return 10 * math.log10(255.0**2 / max(float(squared_error.mean()), 1e-6))
