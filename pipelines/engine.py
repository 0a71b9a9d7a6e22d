"""Everything DeepSpeed: configuration, initialisation, checkpoints, and weights gathered from shards.

It does not know Ray, the cache, or what the module computes.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim.lr_scheduler import LambdaLR

from pipelines.config import TrainConfig
from prophy.device import default_device, has_bfloat16
from prophy.errors import ProPhyError

# Otherwise DeepSpeed asks the compiler which ops it could build, and on a CPU builds one (40 s): shared
# memory for tensor-parallel inference, which training never calls.
deepspeed.ops.__compatible_ops__ = {}


def deepspeed_config(train: TrainConfig) -> dict[str, Any]:
    """The configuration that DeepSpeed gets.

    Parameters keep the precision they are loaded with; `bf16` is autocast; gradients are reduced in float32.
    """
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": {"stage": train.zero_stage},
        "torch_autocast": {
            "enabled": train.precision == "bf16" and has_bfloat16(default_device()),
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.learning_rate, "weight_decay": train.weight_decay, "torch_adam": True},
        },
    }


def initialize(module: torch.nn.Module, train: TrainConfig) -> DeepSpeedEngine:
    """Wraps `module` for this rank of the process group; optimises the parameters that require gradients.

    The learning rate rises linearly over `warmup_steps` and stays.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # calls that DeepSpeed makes

    def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, train.warmup_steps)))

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        lr_scheduler=schedule,
        config=deepspeed_config(train),
    )
    return engine


def backward_and_step(engine: DeepSpeedEngine, loss: torch.Tensor) -> float | None:
    """Accumulates the gradients of one micro-batch; the last one of a step clips them and updates.

    Returns:
        Norm of all gradients before clipping, after the last micro-batch of a step; None after the others.
    """
    last = engine.is_gradient_accumulation_boundary()
    engine.backward(loss)
    norm = None
    if last and not engine.zero_optimization():  # which DeepSpeed clips without keeping the norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if last and engine.zero_optimization():
        norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def save_checkpoint(engine: DeepSpeedEngine, folder: Path) -> None:
    """Saves this rank's share of trained parameters, optimiser and schedule; call it on every rank.

    The folders of all ranks together are the checkpoint.
    """
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)


def load_checkpoint(engine: DeepSpeedEngine, folder: Path) -> None:
    """Restores what as many ranks saved, `engine.global_steps` included; call it on every rank.

    Raises:
        ProPhyError: the folder holds no checkpoint.
    """
    path, _ = engine.load_checkpoint(str(folder), load_module_strict=False)
    if path is None:
        raise ProPhyError(
            f"{folder} holds no checkpoint of DeepSpeed; remove it, or start in another run_dir"
        )


@contextmanager
def gathered_parameters(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within the block the trained parameters are whole on every rank, for any ZeRO stage; a collective."""
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, enabled=engine.zero_optimization_stage() == 3):
        yield
