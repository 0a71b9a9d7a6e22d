"""Runs a function on the processes of one group of torch.distributed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

Result = dict[Any, Any]


def on_ranks(world_size: int, function: Callable[[int, Path], Result], folder: Path) -> Result:
    """Runs `function(rank, folder)` on the processes of one group; what rank 0 returns."""
    multiprocessing.spawn(rank_main, (world_size, function, folder), nprocs=world_size)
    return torch.load(folder / "result.pt")


def rank_main(rank: int, world_size: int, function: Callable[[int, Path], Result], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    # The ranks meet in a file: a port that was free may be taken by the time they listen. DeepSpeed looks for
    # MPI where these are not set, although the group is there.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    result = function(rank, folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.barrier()
    os._exit(0)  # the work is done: at a usual exit gloo's threads now and then abort the process
