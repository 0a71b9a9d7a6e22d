"""How quick generation is: what the branch costs, and what step caches and batches save and change.

    python tests/benchmarks/generation.py [NUM_PROMPTS]

On the embedded default. All contestants make the videos of one prompt after the other, so that what else
the machine does strikes each of them; times are ratios within the run. Fidelity is the PSNR against the same
video with all steps, made alone. To take fewer steps is the plain way to save time: a cache has to beat it.
The last table counts operations of a forward pass of Wan2.1-1.3B, 81 frames of 480x832, on the meta device.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import load_config
from pipelines.generation.generate import video_spec
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import PhysicsSpec, StepCache, VideoSpec
from pipelines.training.model import branch_config
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.taxonomy import load_taxonomy
from prophy.training.cost import _call, _grouped_mm_flop

PHENOMENA = load_taxonomy("wisa").names
WHOLE = "all steps, branch on (scale 1)"
CACHES: dict[str, Sequence[float]] = {
    "first_block": (0.05, 0.1, 0.2, 0.4),
    "sea": (0.1, 0.2, 0.4, 0.8),
    "taylorseer": (2, 3, 5),
}
FEWER_STEPS = (20, 15, 10)
BATCH_SIZES = (1, 2, 4, 8)
LATENTS, TEXT = (16, 21, 60, 104), {"prompt_embeds": (512, 4096)}


def contestants(video: VideoSpec) -> dict[str, VideoSpec]:
    """The ways to make a video."""
    ways: dict[str, dict[str, Any]]
    ways = {WHOLE: {}, "all steps, branch off (scale 0)": {"physics": PhysicsSpec(scale=0.0)}}
    ways |= {f"{steps} steps": {"num_inference_steps": steps} for steps in FEWER_STEPS}
    for cache, values in CACHES.items():
        ways |= {f"{cache} {value:g}": {"step_cache": StepCache(**{cache: value})} for value in values}
    return {name: video.model_copy(update=changes) for name, changes in ways.items()}


class Denoiser:
    """Makes videos; keeps how long the denoising took and how often the blocks after the first ran."""

    def __init__(self, sampler: VideoSampler) -> None:
        self._sampler = sampler
        sampler._pipeline.transformer.blocks[1].attn1.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_passes += 1

    def __call__(self, specs: Sequence[VideoSpec]) -> np.ndarray:
        self.num_passes = 0
        for video in specs:
            self._sampler.embed(video.prompt)
        start = time.perf_counter()
        frames = self._sampler.sample_batch(specs, self._step)
        self.denoise_s, self.total_s = self._last_step - start, time.perf_counter() - start
        return frames

    def _step(self, progress: float) -> None:
        self._last_step = time.perf_counter()


def psnr(videos: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> str:
    """Peak signal-to-noise ratio in dB, of the mean square error over all videos."""
    error = np.mean(np.square(np.asarray(videos, np.float64) - np.asarray(references)))
    return "equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f}"


def compare_caches(denoise: Denoiser, videos: Sequence[VideoSpec]) -> Table:
    frames, seconds, passes = defaultdict(list), defaultdict(list), defaultdict(list)
    for video in videos:
        for name, way in contestants(video).items():
            frames[name].append(denoise([way])[0])
            seconds[name].append(denoise.denoise_s)
            passes[name].append(denoise.num_passes)
    table = Table("", "speed-up", "steps computed", "PSNR, dB", title="denoising, against all steps")
    for name in frames:
        speed_up = np.median(np.divide(seconds[WHOLE], seconds[name]))
        computed = np.sum(passes[name]) / np.sum(passes[WHOLE])
        table.add_row(name, f"{speed_up:.2f}", f"{computed:.0%}", psnr(frames[name], frames[WHOLE]))
    return table


def compare_batches(denoise: Denoiser, videos: Sequence[VideoSpec]) -> Table:
    """Each batch size makes the same videos, in whole."""
    frames: dict[int, list[np.ndarray]] = {}
    seconds: dict[int, float] = {}
    for size in BATCH_SIZES:
        batches = [videos[start : start + size] for start in range(0, len(videos), size)]
        frames[size], seconds[size] = [], 0.0
        for batch in batches:
            frames[size] += list(denoise(batch))
            seconds[size] += denoise.total_s
    table = Table(
        "videos in a batch", "s per video, relative", "PSNR, dB", title="batches, decoding included"
    )
    for size in BATCH_SIZES:
        table.add_row(str(size), f"{seconds[size] / seconds[1]:.2f}", psnr(frames[size], frames[1]))
    return table


def count_operations() -> Table:
    with torch.device("meta"):
        transformer = ProPhyWanTransformer3DModel(
            num_attention_heads=12,
            ffn_dim=8960,
            num_layers=30,
            physics=branch_config(load_config("wan2.1-1.3b").physics, LATENTS[1:], PHENOMENA).model_dump(),
        )
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flop})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _call("predict", transformer, 1, LATENTS, TEXT, (), "meta")
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def share(*modules: str) -> float:
        return sum(counts[f"_Call.transformer.{name}"] for name in modules) / counts["Global"]

    branch = transformer.physics_branch
    blocks = [f"physics_branch.blocks.{index}" for index in range(len(branch.blocks))]
    semantic, refinement = "physics_branch.semantic", "physics_branch.refinement"
    whole = share(semantic, *blocks, refinement, f"{refinement}_injection")
    first = share(semantic, blocks[0], "blocks.0")
    table = Table("", "of all operations", title="a forward pass of Wan2.1-1.3B with its branch")
    table.add_row("Physical Branch", f"{whole:.1%}")
    table.add_row("of that, Semantic Expert Block", f"{share(semantic):.5%}")
    table.add_row("a step that first_block skips: first block, first Physical Block", f"{first:.1%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("num_prompts", nargs="?", type=int, default=8)
    num_prompts = parser.parse_args().num_prompts
    console = Console(width=110)
    prompts = resources.files("prophy.tiny").joinpath("prompts.txt").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("tiny", [f"run_dir={folder}"])
    videos = [video_spec(config, prompt) for prompt in prompts[:num_prompts]]
    denoise = Denoiser(VideoSampler(config))
    denoise(videos[:1])  # warm-up
    num_steps, num_threads = config.sampling.num_inference_steps, torch.get_num_threads()
    console.print(f"{len(videos)} videos, {num_steps} steps, {num_threads} threads")
    console.print(compare_caches(denoise, videos))
    console.print(compare_batches(denoise, videos))
    console.print(count_operations())


if __name__ == "__main__":
    main()
