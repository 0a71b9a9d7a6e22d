"""Memory of each rank while a model is loaded for training: two ranks, a few hundred million parameters.

Claims: with ZeRO 3 a rank never holds much more than its share of the weights; loading the model whole, as
`from_pretrained` does, holds all of it on every rank. What is counted is anonymous memory (RssAnon) above
that before loading: pages of files that are mapped are the system's to drop, and shared by the ranks.
Run it with `python tests/benchmarks/loading.py [--layers 18]` (18 blocks are 300 million parameters).
"""

import argparse
import os
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch import multiprocessing, nn

from pipelines.config import Config, load_config
from prophy.backbones.pretrained import resolve_pretrained
from prophy.taxonomy import load_taxonomy
from prophy.tiny.pipeline import TRANSFORMER

PHENOMENA = load_taxonomy("wisa").names
WORLD_SIZE = 2
WIDE = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096}
MODES = ("whole", "zero2", "zero3")
MB = 1e6


def write_backbone(folder: Path, num_layers: int) -> None:
    """The embedded pipeline with a wide transformer of random float32 weights, in files of 200 MB."""
    shutil.copytree(resolve_pretrained("tiny"), folder, ignore=shutil.ignore_patterns("transformer"))
    transformer = WanTransformer3DModel(**TRANSFORMER | WIDE | {"num_layers": num_layers})
    transformer.save_pretrained(folder / "transformer", max_shard_size="200MB")


def run_config(folder: Path, mode: str) -> Config:
    return load_config(
        "tiny",
        [
            f"run_dir={folder / 'run'}",
            f"backbone.pretrained={folder / 'backbone'}",
            "backbone.dtype=bfloat16",
            "physics.physics_layers=[0]",
            "train.start_from=null",
            f"train.zero_stage={2 if mode == 'zero2' else 3}",
        ],
    )


class PeakMemory:
    """Highest anonymous memory of this process while it is open, above that at the start."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.held, self.peak = anonymous() - self.start, self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) * 1024


def rank_main(rank: int, port: int, folder: Path, mode: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from pipelines.training.engine import placement  # DeepSpeed looks at the environment
    from pipelines.training.model import build_module

    config, null = run_config(folder, mode), {"prompt_embeds": torch.zeros(32, 192)}
    place = placement(config.train)
    with PeakMemory() as memory:
        start = time.perf_counter()
        if mode == "whole":
            module: nn.Module = WanTransformer3DModel.from_pretrained(
                folder / "backbone" / "transformer", dtype=torch.bfloat16
            )
        else:
            module = build_module(config, null, PHENOMENA, place=place)
        seconds = time.perf_counter() - start
    parameters = list(module.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    own = sum(getattr(p, "ds_tensor", p).nbytes for p in parameters)
    torch.save((total, own, memory.held, memory.peak, seconds), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    num_layers = parser.parse_args().layers
    table = Table(
        title=f"loading a backbone of {num_layers} blocks for training, {WORLD_SIZE} ranks, MB per rank"
    )
    columns = ("mode", "million parameters", "its tensors", "anonymous after", "anonymous peak", "seconds")
    for column in columns:
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_backbone(folder / "backbone", num_layers)
        for mode in MODES:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            multiprocessing.spawn(rank_main, (port, folder, mode), nprocs=WORLD_SIZE)
            ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]
            total, own, held, peak, seconds = (max(values) for values in zip(*ranks, strict=True))
            sizes = [f"{value / MB:.0f}" for value in (total, own, held, peak)]
            table.add_row(mode, *sizes, f"{seconds:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
