"""Everything DeepSpeed: configuration, initialisation, steps, and what each rank holds.

It does not know Ray, the cache, or what the module computes. Checkpoints are not DeepSpeed's own: those are
pickles that only as many ranks with the same ZeRO stage can read.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from pipelines.config import TrainConfig
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_store import CheckpointStore
from pipelines.training.saving import Fragment, Save
from pipelines.training.schedule import learning_rate_factor
from pipelines.training.states import reduce_bucket_size
from prophy.device import default_device, has_bfloat16
from prophy.models.physics_transformer import BRANCH

_STATE = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def deepspeed_config(train: TrainConfig) -> dict[str, Any]:
    """The configuration that DeepSpeed gets.

    Parameters keep the precision they are loaded with; `bf16` is autocast; gradients are reduced in float32.
    """
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "contiguous_gradients": train.zero_stage > 1,  # ZeRO 1 has all gradients when it reduces them
    }
    # A copy between a GPU and memory that is not pinned is several times slower.
    offload = {"device": "cpu", "pin_memory": default_device().type == "cuda"}
    if train.offload != "none":
        zero["offload_optimizer"] = offload
    if train.offload == "all":
        zero["offload_param"] = offload
    return {
        "zero_force_ds_cpu_optimizer": False,  # with offload: torch's AdamW, as everywhere
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": zero,
        "torch_autocast": {
            "enabled": train.precision == "bf16" and has_bfloat16(default_device()),
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "weight_decay": train.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
    }


def placement(train: TrainConfig) -> Callable[[torch.nn.Parameter, torch.dtype], None]:
    """What puts a parameter where this rank keeps it, so that none waits whole for the engine.

    With ZeRO 3 the rank keeps its share of it; a collective, with the same parameters in the same order.
    Otherwise all of it, on the rank's device.
    """
    device = default_device()
    if train.zero_stage < 3:

        def move(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
            parameter.data = parameter.data.to(device, dtype, copy=parameter.requires_grad)

        return move
    _build_no_ops()
    # As `deepspeed.initialize` shards a module that is whole; there all parameters at once. One buffer holds
    # the whole parameters in turn: memory of each its own would leave holes between the shares.
    sharding = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(train), dtype=torch.float32)
    buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def shard(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
        nonlocal buffer
        size = parameter.numel() * dtype.itemsize
        if size > len(buffer):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        whole = buffer[:size].view(dtype).view(parameter.shape)
        parameter.data = whole.copy_(parameter.data)
        sharding._convert_to_zero_parameters([parameter])

    return shard


def initialize(module: torch.nn.Module, train: TrainConfig, compiled: Sequence[str] = ()) -> DeepSpeedEngine:
    """Wraps `module` for this rank of the process group; optimises the parameters that require gradients.

    The branch has the learning rate of its own, what is trained of the backbone has the other. With ZeRO 3 a
    part of the class `compiled` is gathered as a whole: its graph knows nothing of shards.
    """
    _build_no_ops()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # calls that DeepSpeed makes
    groups, settings = _parameter_groups(module, train), deepspeed_config(train)
    num_trained = sum(getattr(part, "ds_numel", part.numel()) for group in groups for part in group["params"])
    settings["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_size(num_trained)
    move_buffers(module, default_device())
    if compiled and train.zero_stage == 3:
        deepspeed.utils.set_z3_leaf_modules(module, [*compiled])
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=settings)
    _make_optimizer_state(engine)
    return engine


def _build_no_ops() -> None:
    """Spares a CPU 40 s, for which DeepSpeed has no setting.

    Else it asks the compiler which ops it could build, and builds one that training never calls: shared
    memory for tensor-parallel inference.
    """
    deepspeed.ops.__compatible_ops__ = {}


def move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Moves what is not a parameter; DeepSpeed moves nothing of a module whose parameters are sharded."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def set_learning_rate(engine: DeepSpeedEngine, train: TrainConfig) -> float:
    """Sets the learning rates of the next step, a function of its number alone, and returns the branch's."""
    factor = learning_rate_factor(train, engine.global_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
    return factor * train.learning_rate


def optimizer_step(engine: DeepSpeedEngine) -> float | None:
    """After the backward pass of each micro-batch: the last one of a step clips the gradients and updates.

    Returns:
        Norm of all gradients before clipping, after the last micro-batch of a step; None after the others.
    """
    last, norm = engine.is_gradient_accumulation_boundary(), None
    if last and not engine.zero_optimization():  # which DeepSpeed clips without keeping the norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if last and engine.zero_optimization():
        norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def fragments(engine: DeepSpeedEngine, ema: "Ema | None" = None) -> list[Fragment]:
    """What this rank holds of the trained parameters and of what the optimiser (and `ema`) keeps of them.

    With ZeRO these are its shards; without, everything on every rank.
    """
    stage = engine.zero_optimization_stage()
    found = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            state = engine.optimizer.state[parameter]
            start, tensors = 0, {"parameter": parameter.data, **{kind: state[kind] for kind in _STATE}}
        elif stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:  # it lies with other ranks
                continue
            start = mapping.lp_fragment_address.start
            tensors = {"parameter": mapping.hp_fragment}
            tensors |= {kind: mapping.get_optim_state_fragment(kind) for kind in _STATE}
        else:
            # The public `safe_get_local_*` copies what is offloaded to the device: nothing to load into.
            shards = {
                kind: engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)[0]
                for kind, key in {"parameter": None, **{kind: kind for kind in _STATE}}.items()
            }
            start = len(shards["parameter"]) * engine.optimizer._get_param_partition_rank(parameter)
            length = parameter.ds_numel - start  # the last shards are padded
            if length <= 0:
                continue
            tensors = {kind: shard[:length] for kind, shard in shards.items()}
        flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
        if ema is not None:
            flat["ema"] = ema.averages[name]
        found.append(Fragment(name, start, flat))
    return found


def shapes(engine: DeepSpeedEngine) -> dict[str, torch.Size]:
    """Shapes of the trained parameters, whole."""
    return {
        name: whole_shape(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter whose share alone may lie here, as with ZeRO 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


class Ema:
    """Exponential moving average of the trained parameters, each rank of what it holds.

    Args:
        decay: share of the old average that a step keeps; less in the first steps, (1 + step) / (10 + step).
        parts: `fragments` of the engine.
    """

    def __init__(self, decay: float, parts: list[Fragment]) -> None:
        self._decay = decay
        self._parameters = [part.tensors["parameter"] for part in parts]
        self.averages = {part.name: part.tensors["parameter"].clone() for part in parts}

    def update(self, step: int) -> None:
        """Takes in the parameters after `step` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), self._parameters, 1 - decay)


def begin_save(
    engine: DeepSpeedEngine, ema: Ema | None, store: CheckpointStore, run: Mapping[str, Any]
) -> Save:
    """Begins to save trained parameters, optimiser, average and step; a collective.

    Raises:
        EveryRankError: the store cannot be used.
    """
    parts = fragments(engine, ema)
    if engine.zero_optimization_stage() == 0:  # every rank has all of it, and writes its share
        parts = [_share(part) for part in parts]
    return Save(store, engine.global_steps, parts, shapes(engine), run)


def load_optimizer(engine: DeepSpeedEngine, ema: Ema | None, checkpoint: Checkpoint) -> None:
    """Gives the optimiser, the average and the step counter what they had; each rank reads its own part."""
    engine.global_steps = checkpoint.step
    for state in _base_optimizer(engine).state.values():
        state["step"].fill_(checkpoint.step)
    for part in fragments(engine, ema):
        for kind, value in part.tensors.items():
            if kind != "parameter":
                value.copy_(checkpoint.read(kind, part.name, part.start, part.start + len(value)))


def _parameter_groups(module: torch.nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Branch and backbone, each with its learning rate."""
    branch: list[torch.nn.Parameter] = []
    backbone: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (branch if BRANCH in name else backbone).append(parameter)
    rates = ((branch, train.learning_rate), (backbone, train.backbone_learning_rate))
    return [{"params": own, "lr": rate, "initial_lr": rate} for own, rate in rates if own]


def _make_optimizer_state(engine: DeepSpeedEngine) -> None:
    """Makes the state that AdamW would make at its first step."""
    base = _base_optimizer(engine)
    if engine.zero_optimization_stage() == 3:
        held = engine.optimizer.fp32_partitioned_groups_flat
    else:
        held = [parameter for group in base.param_groups for parameter in group["params"]]
    for parameter in held:
        base.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            **{kind: torch.zeros_like(parameter) for kind in _STATE},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _share(part: Fragment) -> Fragment:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    length = len(part.tensors["parameter"])
    low, high = length * rank // world_size, length * (rank + 1) // world_size
    return Fragment(
        part.name, part.start + low, {kind: value[low:high] for kind, value in part.tensors.items()}
    )
