"""`prophy plan`: what training takes of each GPU, before a weight is fetched. Reads configurations alone.

Parameters are counted on the meta device. What ZeRO shares out follows DeepSpeed's own estimators
(`estimate_zero2_model_states_mem_needs` and zero3's), told apart by what is trained and what is frozen.
"""

from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.config import Config, TrainConfig
from pipelines.training.model import branch_config
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import check_bare, load_configs
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.taxonomy import load_taxonomy
from prophy.training.cost import count_flops, count_routing_flops, count_saved_bytes

USABLE = 0.9  # share of a GPU's memory; the rest is CUDA's context and fragments
_MASTER_GRADIENT = 4  # bytes per trained parameter: the gradient in float32,
_MASTER_STATE = 4 + 8  # and the parameter and AdamW's two moments
_ADAMW = 8
_MAX_BUCKET = 500_000_000  # gradients that are reduced at once
_MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default `stage3_max_live_parameters`
_ASSUMED_FLOPS = 300e12  # per second and GPU: 30 % of an H100's peak, as Megatron reaches with Wan 14B


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


@dataclass(frozen=True)
class Way:
    """A way to train: the keys of the configuration that decide about memory."""

    zero_stage: int
    offload: str
    gradient_checkpointing: bool

    @property
    def overrides(self) -> str:
        """The arguments of `prophy train`."""
        keys = {
            "zero_stage": self.zero_stage,
            "offload": self.offload,
            "gradient_checkpointing": str(self.gradient_checkpointing).lower(),
        }
        return " ".join(f"--set train.{key}={value}" for key, value in keys.items())


# The less there is to compute twice and to communicate, the faster: the first that fits is advised. ZeRO 2
# reduces gradients after every micro-batch, ZeRO 1 after the last.
WAYS = [
    Way(1, "none", False),
    Way(2, "none", False),
    Way(1, "none", True),
    Way(2, "none", True),
    Way(3, "none", True),
    Way(2, "optimizer", True),
    Way(3, "optimizer", True),
    Way(3, "all", True),
]
SHOWN = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]


@dataclass(frozen=True)
class Plan:
    """What training by a configuration takes.

    Attributes:
        train: the configuration.
        size: the model's.
        num_tokens: tokens of a sample in the transformer.
        text_length: tokens of the text encoder.
        flops: operations of a step, over all GPUs.
        routing_flops: those of them by which load balancing knows ahead what later micro-batches choose.
        activations: bytes of a micro-batch, by whether gradients are checkpointed; an estimate.
    """

    train: TrainConfig
    size: ModelSize
    num_tokens: int
    text_length: int
    flops: int
    routing_flops: int
    activations: dict[bool, int]

    def total(self, way: Way) -> int:
        """Bytes per GPU, activations included."""
        states = model_states(self.size, self.train.num_workers, way.zero_stage, way.offload)
        return states.total + self.activations[way.gradient_checkpointing]

    def advice(self, gpu_memory: float) -> Way | None:
        """The fastest way that fits into `gpu_memory` bytes; None if none does."""
        return next((way for way in WAYS if self.total(way) <= USABLE * gpu_memory), None)


def run(config: Config, gpu_memory_gb: float) -> None:
    """Prints the plan for `train.num_workers` GPUs of this much memory.

    Raises:
        ProPhyError: the backbone is neither a published one nor a folder, and the hub cannot be reached.
    """
    plan, console = make_plan(config), Console()
    clip, train, size, gpu_memory = config.backbone, plan.train, plan.size, gpu_memory_gb * 1e9
    seconds = plan.flops / train.num_workers / _ASSUMED_FLOPS
    console.print(
        f"{clip.pretrained}: {_billions(size.backbone)} parameters, and {_billions(size.branch)} of the "
        f"branch; {_billions(size.trained)} are trained\n"
        f"a sample of {clip.num_frames} frames of {clip.height}x{clip.width} has {plan.num_tokens:,} tokens, "
        f"and {plan.text_length} of text\n"
        f"a step of {train.global_batch_size} samples, {train.gradient_accumulation_steps} micro-batches of "
        f"{train.micro_batch_size} on each of {train.num_workers} GPUs, takes {plan.flops / 1e15:.3g} PFLOP: "
        f"{seconds:.3g} s if each GPU does {_ASSUMED_FLOPS / 1e12:.0f} TFLOP/s, and about a third more with "
        f"gradient checkpointing; {plan.routing_flops / plan.flops:.1%} of it is routing ahead for load "
        f"balancing over the global batch, which keeps no activations\n",
        highlight=False,
    )
    console.print(_table(plan, gpu_memory))
    way = plan.advice(gpu_memory)
    if way is None:
        console.print("nothing fits: take more GPUs or larger ones, smaller clips, or fewer physics_layers")
    else:
        console.print(f"advice: {way.overrides}", highlight=False, soft_wrap=True)


def make_plan(config: Config) -> Plan:
    """Builds the model on the meta device and counts.

    Raises:
        ProPhyError: as `run`.
    """
    backbone, train = config.backbone, config.train
    family = FAMILIES[backbone.family]
    vae, transformer_config = _configs(config)
    latents = family.latent_shape(
        backbone.num_frames, backbone.height, backbone.width, vae, transformer_config
    )
    physics = branch_config(config.physics, latents, load_taxonomy(config.taxonomy).names)
    with torch.device("meta"):
        transformer = family.classes().prophy_transformer.from_config(
            {**transformer_config, "physics": physics.model_dump(mode="json")}
        )
    if train.backbone == "lora":
        transformer.add_lora(train.lora_rank, train.lora_alpha)
    transformer.train_backbone(train.backbone)
    shape = (transformer.config.in_channels, *latents)
    text = family.text(transformer.config, backbone.max_sequence_length)
    work = (transformer, train.micro_batch_size, shape, text)
    t, h, w = family.token_grid(latents, transformer_config)
    routing_flops = 0
    if transformer.physics_branch.refinement is not None and train.gradient_accumulation_steps > 1:
        ahead = (train.gradient_accumulation_steps - 1) * train.num_workers
        routing_flops = count_routing_flops(*work) * ahead
    size = _size(transformer, getattr(torch, backbone.dtype))
    saved = count_saved_bytes(*work) * (2 if train.precision == "fp32" else 1)
    # Autocast keeps a copy of each trained weight until the forward pass ends, or is saved for the backward.
    copies = size.trained * (0 if train.precision == "fp32" else torch.bfloat16.itemsize)
    checkpointed = _checkpointed(transformer, saved, t * h * w, train)
    return Plan(
        train=train,
        size=size,
        num_tokens=t * h * w,
        text_length=backbone.max_sequence_length,
        flops=count_flops(*work) * train.gradient_accumulation_steps * train.num_workers + routing_flops,
        routing_flops=routing_flops,
        activations={False: saved + copies, True: checkpointed + copies},
    )


def model_states(size: ModelSize, num_gpus: int, zero_stage: int, offload: str) -> Memory:
    """Memory of weights, gradients and optimizer on each of `num_gpus`, as DeepSpeed's estimators have it.

    Args:
        size: the model's.
        num_gpus: that share the work.
        zero_stage: 0 to 3.
        offload: "none", "optimizer" or "all", as in the configuration.
    """
    weights, trained = size.trained * size.trained_bytes, size.trained
    bucket = 4 * reduce_bucket_size(trained)  # in float32
    if zero_stage == 0:
        return Memory(size.frozen_bytes + weights, weights, _ADAMW * trained)
    if zero_stage == 3:
        gathered = min(size.frozen_bytes + weights, _MAX_LIVE_PARAMETERS * size.trained_bytes)
        resident, buffers = (size.frozen_bytes + weights) // num_gpus, bucket + gathered
        gradients = 0  # each shard's are in float32 at once
    else:
        resident, buffers = size.frozen_bytes + weights, bucket
        gradients = weights if zero_stage == 1 else weights // num_gpus
    if offload == "none":
        gradients += _MASTER_GRADIENT * trained // num_gpus
        return Memory(resident, gradients, _MASTER_STATE * trained // num_gpus, buffers)
    host = (_MASTER_GRADIENT + _MASTER_STATE) * trained
    if offload == "optimizer":
        return Memory(resident, 0, 0, buffers, host)
    return Memory(0, 0, 0, buffers, host + size.frozen_bytes + weights)


def _configs(config: Config) -> tuple[dict, dict]:
    """Configurations of VAE and transformer: those of a published model come with the product."""
    backbone, family = config.backbone, FAMILIES[config.backbone.family]
    if backbone.pretrained not in family.published:
        check_bare(backbone.family, backbone.pretrained, backbone.revision)
        vae, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
        return dict(vae), dict(transformer)
    with torch.device("meta"):
        upstream = family.classes().transformer(**family.published[backbone.pretrained])
    return dict(family.published_vae), dict(upstream.config)


def _size(transformer: PhysicsTransformer, dtype: torch.dtype) -> ModelSize:
    """As training has it: what is frozen in the backbone's precision, what is trained in float32."""
    branch = sum(parameter.numel() for parameter in transformer.physics_branch.parameters())
    total = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return ModelSize(
        backbone=total - branch,
        branch=branch,
        trained=trained,
        trained_bytes=torch.float32.itemsize,
        frozen_bytes=(total - trained) * dtype.itemsize,
    )


def _checkpointed(transformer: PhysicsTransformer, saved: int, num_tokens: int, train: TrainConfig) -> int:
    """Every block's input and every residual, and the inside of one block, which is computed again."""
    config = transformer.config
    num_layers, num_physical = config.num_layers, len(transformer.physics_branch.blocks)
    item = 4 if train.precision == "fp32" else 2
    tokens = train.micro_batch_size * num_tokens * config.num_attention_heads * config.attention_head_dim
    return (num_layers + 2 * num_physical) * tokens * item + saved // (num_layers + num_physical)


def _table(plan: Plan, gpu_memory: float) -> Table:
    checkpointing = plan.train.gradient_checkpointing
    activations = plan.activations[checkpointing]
    table = Table(
        *("ZeRO", "offload", "weights", "gradients", "optimizer", "buffers", "activa-\ntions*", "GPU"),
        *(f"fits\n{gpu_memory / 1e9:g} GB", "host"),
        title="GB per GPU; host: of all GPUs",
        caption=f"* an estimate, {'with' if checkpointing else 'without'} gradient checkpointing; "
        f"{'without' if checkpointing else 'with'}: {_gb(plan.activations[not checkpointing])}. "
        f"Up to {USABLE:.0%} of a GPU are used.",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for zero_stage, offload in SHOWN:
        states = model_states(plan.size, plan.train.num_workers, zero_stage, offload)
        parts = [states.weights, states.gradients, states.optimizer, states.buffers, activations]
        total = states.total + activations
        fits = "yes" if total <= USABLE * gpu_memory else "no"
        table.add_row(str(zero_stage), offload, *map(_gb, parts), _gb(total), fits, _gb(states.host))
    return table


def _billions(number: int) -> str:
    return f"{number / 1e9:.3f}B"


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f}"
