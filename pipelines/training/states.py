"""What DeepSpeed keeps of a model on each GPU: weights, gradients, optimizer, buffers.

What ZeRO shares out follows DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs` and zero3's),
told apart by what is trained and what is frozen.
"""

from dataclasses import dataclass

_MASTER_GRADIENT = 4  # bytes per trained parameter: the gradient in float32,
_MASTER_STATE = 4 + 8  # and the parameter and AdamW's two moments
_ADAMW = 8
_AVERAGE = 4  # of `train.ema_decay`
_MAX_BUCKET = 500_000_000  # gradients that are reduced at once
_MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default `stage3_max_live_parameters`


def reduce_bucket_size(num_trained: int) -> int:
    """How many gradients DeepSpeed shall reduce at once; its own 2 GB it would make anew in every step."""
    return min(num_trained, _MAX_BUCKET)


@dataclass(frozen=True)
class ModelSize:
    """A transformer with its branch.

    Attributes:
        backbone: parameters.
        branch: parameters.
        trained: parameters that are trained.
        trained_bytes: bytes of one trained parameter.
        frozen_bytes: bytes of all other parameters together.
    """

    backbone: int
    branch: int
    trained: int
    trained_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; `host` is the CPU's memory for all GPUs together.

    Attributes:
        weights: parameters as the forward pass uses them.
        gradients: as they are kept until the optimizer has stepped.
        optimizer: parameters in float32 and AdamW's moments.
        buffers: what DeepSpeed communicates with; with ZeRO 3 the parameters gathered at a time.
        host: what is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All that lies on the GPU, without activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def model_states(
    size: ModelSize, num_gpus: int, zero_stage: int, offload: str, averages: bool = False
) -> Memory:
    """Memory of weights, gradients and optimizer on each of `num_gpus`, as DeepSpeed's estimators have it.

    Args:
        size: the model's.
        num_gpus: that share the work.
        zero_stage: 0 to 3.
        offload: "none", "optimizer" or "all", as in the configuration.
        averages: whether moving averages of what is trained are kept, beside the optimizer's state.
    """
    average = _AVERAGE if averages else 0
    weights, trained = size.trained * size.trained_bytes, size.trained
    bucket = 4 * reduce_bucket_size(trained)  # in float32
    if zero_stage == 0:
        return Memory(size.frozen_bytes + weights, weights, (_ADAMW + average) * trained)
    if zero_stage == 3:
        gathered = min(size.frozen_bytes + weights, _MAX_LIVE_PARAMETERS * size.trained_bytes)
        resident, buffers = (size.frozen_bytes + weights) // num_gpus, bucket + gathered
        gradients = 0  # each shard's are in float32 at once
    else:
        resident, buffers = size.frozen_bytes + weights, bucket
        gradients = weights if zero_stage == 1 else weights // num_gpus
    if offload == "none":
        gradients += _MASTER_GRADIENT * trained // num_gpus
        return Memory(resident, gradients, (_MASTER_STATE + average) * trained // num_gpus, buffers)
    host = (_MASTER_GRADIENT + _MASTER_STATE + average) * trained
    if offload == "optimizer":
        return Memory(resident, 0, 0, buffers, host)
    return Memory(0, 0, 0, buffers, host + size.frozen_bytes + weights)
