"""DeepSpeed on two real processes: every ZeRO stage trains alike, resumes exactly and gives whole weights."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn

from pipelines.config import TrainConfig

WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)
Result = dict[str, Any]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_two_ranks(function: Callable[..., Result], folder: Path, *arguments: Any) -> Result:
    """Runs `function(rank, folder, *arguments)` on two processes of one group; what rank 0 returns."""
    multiprocessing.spawn(rank_main, (free_port(), function, folder, *arguments), nprocs=WORLD_SIZE)
    return torch.load(folder / "result.pt")


def rank_main(rank: int, port: int, function: Callable[..., Result], folder: Path, *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    result = function(rank, folder, *arguments)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


def train_config(zero_stage: int, **values: Any) -> TrainConfig:
    return TrainConfig(
        num_steps=6,
        micro_batch_size=2,
        num_workers=WORLD_SIZE,
        gradient_accumulation_steps=2,
        zero_stage=zero_stage,
        precision="fp32",
        learning_rate=1e-2,
        warmup_steps=4,
        gradient_clipping=0.5,
        **values,
    )


def network() -> nn.Sequential:
    """Three layers, the first of them frozen."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    layers[0].requires_grad_(False)
    return layers


def micro_batch(step: int, index: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + 10 * index + rank))


def loss_of(prediction: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return (prediction - inputs.sum(1, keepdim=True)).square().mean()


def all_stages(rank: int, folder: Path) -> Result:
    return {stage: train_and_resume(rank, folder / str(stage), stage) for stage in STAGES}


def train_and_resume(rank: int, folder: Path, zero_stage: int) -> Result:
    """Six steps; and once more the last three of them, from a checkpoint after the first three."""
    from pipelines.engine import (
        backward_and_step,
        gathered_parameters,
        initialize,
        load_checkpoint,
        save_checkpoint,
    )

    def steps(engine: Any, first: int, last: int) -> list[tuple[float | None, float]]:
        history = []
        for step in range(first, last):
            learning_rate = engine.get_lr()[0]
            for index in range(2):
                inputs = micro_batch(step, index, rank)
                norm = backward_and_step(engine, loss_of(engine(inputs), inputs))
                assert (norm is None) == (index == 0)
            history.append((norm, learning_rate))
        return history

    def weights(engine: Any) -> dict[str, torch.Tensor]:
        with gathered_parameters(engine):
            return {
                name: parameter.detach().clone()
                for name, parameter in engine.module.named_parameters()
                if parameter.requires_grad
            }

    engine = initialize(network(), train_config(zero_stage))
    history = steps(engine, 0, 3)
    own = folder / f"rank{rank}"
    save_checkpoint(engine, own)
    history += steps(engine, 3, 6)
    through = weights(engine)

    shutil.copytree(own, folder / "checkpoint", dirs_exist_ok=True)
    torch.distributed.barrier()
    engine = initialize(network(), train_config(zero_stage))
    load_checkpoint(engine, folder / "checkpoint")
    resumed_at = engine.global_steps
    resumed_history = steps(engine, 3, 6)
    return {
        "weights": through,
        "history": history,
        "resumed_at": resumed_at,
        "resumed_weights": weights(engine),
        "resumed_history": history[:3] + resumed_history,
    }


def train_in_bare_torch() -> Result:
    """The same six steps in one process: mean gradient, clipping, AdamW, linear warm-up."""
    module, config = network(), train_config(0)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    history = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (step + 1) / 4)
        optimizer.zero_grad()
        for index in range(2):
            for rank in range(WORLD_SIZE):
                inputs = micro_batch(step, index, rank)
                (loss_of(module(inputs), inputs) / 4).backward()
        norm = nn.utils.clip_grad_norm_(trained, config.gradient_clipping)
        optimizer.step()
        history.append((norm.item(), optimizer.param_groups[0]["lr"]))
    weights = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    return {"weights": weights, "history": history}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return on_two_ranks(all_stages, tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_every_zero_stage_trains_like_bare_torch(results: Result, zero_stage: int) -> None:
    expected, result = train_in_bare_torch(), results[zero_stage]
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=1e-5)
    history = torch.tensor(result["history"])
    torch.testing.assert_close(history, torch.tensor(expected["history"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_every_zero_stage_resumes_exactly(results: Result, zero_stage: int) -> None:
    result = results[zero_stage]
    assert result["resumed_at"] == 3
    assert result["resumed_history"] == result["history"]
    for name, value in result["weights"].items():
        assert torch.equal(result["resumed_weights"][name], value)
