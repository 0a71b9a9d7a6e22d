"""What training costs beyond the arithmetic: the engine, the data, the branch, the second worker.

On the small default, all in one run: its clips are simulated and cached first. Claims: the product's loop
(Ray Train, DeepSpeed, metrics) takes at most 5 % more than the same steps in bare torch, at steps of 200 ms
or more; and less than 3 % of a step is spent waiting for data.

    python tests/benchmarks/training.py [--steps 30] [--rounds 4]

ZeRO 1 is the default, though one worker has nothing to share out; (d) and (e) are of it.
Every process computes with one thread. Times are medians over blocks of five steps, without the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1", "RAY_AUTH_MODE": "disabled"}

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from pipelines.caching.cache import open_cache
from pipelines.config import Config, load_config
from pipelines.training.data import build_dataset
from pipelines.training.model import build_module
from prophy.backbones.encoding import VideoEncoder
from prophy.device import autocast
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.taxonomy import load_taxonomy
from prophy.video import read_frames

WISA = load_taxonomy("wisa")
BLOCK = 5  # steps
BATCH_SIZE = 4
NO_BRANCH = [
    "physics.physical_blocks=false",
    "physics.num_semantic_experts=0",
    "physics.num_refinement_experts=0",
]
MODELS = {
    "LoRA of the backbone": [*NO_BRANCH, "train.backbone=lora", "train.lora_rank=32"],
    "ProPhy, 1 PB": ["physics.physics_layers=[0]"],
    "ProPhy, 3 PBs (the default)": [],
    "ProPhy, 6 PBs": ["physics.physics_layers=[0,1,2,3,4,5]"],
}


def configuration(folder: Path, run: str, overrides: list[str]) -> Config:
    return load_config(
        "tiny",
        [
            f"run_dir={folder / run}",
            f"cache.input={folder / 'clips'}",
            f"cache.output={folder / 'cache'}",
            f"simulate.output={folder / 'clips'}",
            f"simulate.num_clips={4 * BATCH_SIZE}",
            "train.start_from=null",
            f"train.global_batch_size={BATCH_SIZE}",
            f"train.micro_batch_size={BATCH_SIZE // 2}",
            "train.num_workers=1",
            "train.save_every=100000",
            f"train.log_every={BLOCK}",
            *overrides,
        ],
    )


def product(folder: Path, run: str, overrides: list[str]) -> tuple[float, float]:
    """Seconds of a step of `prophy train`, and the share of them that it waits for data."""
    from pipelines.layout import METRICS_FILE
    from pipelines.training import train

    config = configuration(folder, run, overrides)
    train.run(config)
    lines = (config.run_dir / "train" / METRICS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    return (
        float(np.median([row["step_time_s"] for row in rows])),
        float(np.median([row["data_time_s"] / row["step_time_s"] for row in rows])),
    )


def bare_torch(config: Config) -> float:
    """Seconds of the same steps without Ray, DeepSpeed, metrics or clock."""
    train = config.train
    cache = open_cache(config)()
    module = build_module(config, cache.null_text(), cache.phenomena)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    dataset = build_dataset(config, cache, rank=0)
    loader = DataLoader(dataset, batch_size=None, sampler=range(train.num_steps), num_workers=1)
    marks = [time.perf_counter()]
    for batches, semantic in loader:
        for index, batch in enumerate(batches):
            with autocast(torch.device("cpu"), "bfloat16" if train.precision == "bf16" else None):
                loss = module(batch, semantic if index == len(batches) - 1 else None).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, train.gradient_clipping).item()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
    return float(np.median(np.diff(marks[::BLOCK])[1:])) / BLOCK


def in_a_process(folder: Path, overrides: list[str], part: str = "bare") -> Any:
    """What `part` gives in a new process, which computes with one thread as Ray's workers do."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *overrides]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def online(config: Config) -> list[float]:
    """Seconds that a sample takes where nothing is cached: to decode and encode it, and to ask the VLM."""
    clip, vlm = config.backbone, config.vlm
    encoder = VideoEncoder(
        clip.pretrained, None, clip.dtype, clip.autocast, clip.max_sequence_length, clip.family
    )
    extractor = PriorExtractor(vlm.pretrained, WISA, None, vlm.dtype, None, vlm.layers, vlm.max_new_tokens)
    duration_s = config.cache.clip_duration_s
    videos = sorted(config.simulate.output.rglob("*.mp4"))[: BATCH_SIZE + 1]
    times = []
    for video in videos:
        start = time.perf_counter()
        frames = read_frames(video, 0.0, duration_s, clip.num_frames, clip.height, clip.width)
        encoder.encode_video(frames[None])
        encoder.encode_text(["a red ball falls and bounces on the left"])
        middle = time.perf_counter()
        frames = read_frames(video, 0.0, duration_s, vlm.num_frames, vlm.height, vlm.width)
        extractor([Clip(frames, (vlm.num_frames - 1) / duration_s)])
        times.append((middle - start, time.perf_counter() - middle))
    return np.median(times[1:], axis=0).tolist()


def make_cache(folder: Path) -> None:
    from pipelines.caching import cache
    from pipelines.sandbox import simulate

    config = configuration(folder, "cache", [])
    simulate.run(config)
    cache.run(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of each measurement, a multiple of five")
    parser.add_argument("--rounds", type=int, default=4, help="product and bare torch in turn, so often")
    parser.add_argument("--part", choices=("bare", "online"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        config = configuration(options.folder, "bare", options.overrides)
        print(json.dumps({"bare": bare_torch, "online": online}[options.part](config)))
        return

    from pipelines.runtime import ray_session

    steps, console = [f"train.num_steps={options.steps}"], Console(width=110)
    grid = Table("", "s per step", "ratio", title=f"batch of {BATCH_SIZE}, 320 tokens each, one thread")
    with tempfile.TemporaryDirectory() as name, ray_session(configuration(Path(name), "ray", [])):
        folder = Path(name)
        make_cache(folder)

        # a, e: in turn, since the machine is not always as fast
        bare: list[float] = []
        ours: dict[int, list[tuple[float, float]]] = {stage: [] for stage in (0, 1)}
        for number in range(options.rounds):
            bare.append(in_a_process(folder, steps))
            for stage, found in ours.items():
                changes = [*steps, f"train.zero_stage={stage}"]
                found.append(product(folder, f"zero-{stage}-{number}", changes))
        reference = float(np.median(bare))
        grid.add_row("(a) bare torch", f"{reference:.3f}", "1")
        for stage, found in ours.items():
            seconds = [step for step, _ in found]
            ratio = np.median(np.divide(seconds, bare))
            label = f"    Ray Train and DeepSpeed, ZeRO {stage}"
            grid.add_row(label, f"{np.median(seconds):.3f}", f"{ratio:.3f}")
        step, waiting = np.median(ours[1], axis=0)

        # b: the same, and what would have to be computed for each of its samples
        encode, ask = (BATCH_SIZE * seconds for seconds in in_a_process(folder, steps, "online"))
        for what, more in (("VAE and text", encode), ("VAE, text and VLM", encode + ask)):
            grid.add_row(
                f"(b) {what} online", f"{reference + more:.3f}", f"{(reference + more) / reference:.2f}"
            )

        # c
        times = {model: in_a_process(folder, [*steps, *changes]) for model, changes in MODELS.items()}
        lora = next(iter(times.values()))
        for model, seconds in times.items():
            grid.add_row(f"(c) {model}", f"{seconds:.3f}", f"{seconds / lora:.2f} of LoRA")

        # d: the same global batch
        two, _ = product(folder, "two", [*steps, "train.num_workers=2"])
        grid.add_row("(d) two workers", f"{two:.3f}", f"efficiency {step / two / 2:.2f}")
        grid.add_row("(e) waiting for data", f"{step * waiting:.4f}", f"{waiting:.2%} of the step")
    console.print(grid)


if __name__ == "__main__":
    main()
