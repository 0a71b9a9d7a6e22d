"""`prophy plan`: what training takes of each GPU, before a weight is fetched. Reads configurations alone.

Parameters are counted on the meta device.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.config import Config, TrainConfig
from pipelines.generation.footprint import Footprint, footprint
from pipelines.training.data import shapes_by_clip, sharing_sizes
from pipelines.training.model import branch_config
from pipelines.training.states import Memory, ModelSize, model_states
from pipelines.training.ways import SHOWN, WAYS, Way
from prophy.backbones.families import FAMILIES, ModelConfig
from prophy.backbones.pretrained import check_bare, load_all_configs, load_trained_expert
from prophy.models.eight_bits import stored_layers
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.priors.cost import NUM_PHENOMENA, published_or_loaded, vlm_cost
from prophy.taxonomy import load_taxonomy
from prophy.training.cost import count_flops, count_forward_flops, count_saved_bytes

USABLE = 0.9  # share of a GPU's memory; the rest is CUDA's context and fragments
_GPUS_OF_A_NODE = 8
_ASSUMED_FLOPS = 300e12  # per second and GPU: 30 % of an H100's peak, as Megatron reaches with Wan 14B
_ASSUMED_BYTES = 2e12  # per second and GPU, out of its memory: 60 % of an H100's peak


@dataclass(frozen=True)
class Plan:
    """What training by a configuration takes.

    Attributes:
        train: the configuration.
        size: the model's.
        clip: frames, height and width of the largest sample, which all is counted of.
        num_tokens: its tokens in the transformer.
        text_length: tokens of the text encoder.
        flops: operations of a step, over all GPUs.
        routing_flops: those of them by which load balancing knows ahead what later micro-batches choose.
        recomputed_flops: operations that gradient checkpointing adds to a step.
        token_bytes: bytes of all activations of a micro-batch's tokens, which GPUs may share, by whether
            gradients are checkpointed; an estimate.
        copies: bytes of weights that autocast copies.
        block_tokens: bytes of a micro-batch's tokens in the attention of all blocks, each once.
        sharing_sizes: how many GPUs may share a sample.
        footprint: what making and encoding videos takes.
    """

    train: TrainConfig
    size: ModelSize
    clip: tuple[int, int, int]
    num_tokens: int
    text_length: int
    flops: int
    routing_flops: int
    recomputed_flops: int
    token_bytes: dict[bool, int]
    copies: int
    block_tokens: int
    sharing_sizes: list[int]
    footprint: Footprint

    @property
    def activations(self) -> dict[bool, int]:
        """Bytes on a GPU by a micro-batch, by whether gradients are checkpointed; an estimate."""
        shares = self.train.sequence_parallel
        return {checkpointed: self.copies + size // shares for checkpointed, size in self.token_bytes.items()}

    def total(self, way: Way) -> int:
        """Bytes per GPU, activations included."""
        states = self.states(way.zero_stage, way.offload)
        tokens = self.token_bytes[way.gradient_checkpointing] // way.sequence_parallel
        return states.total + self.copies + tokens

    def exchanged(self, way: Way) -> int:
        """Bytes that each GPU sends in a step to those that share its samples.

        In each block queries, keys and values go one way and the output the other; so do their gradients, and
        what is computed again.
        """
        passes, shares = 3 if way.gradient_checkpointing else 2, way.sequence_parallel
        micro_batches = self.train.global_batch_size // self.train.micro_batch_size
        sent = 4 * passes * self.block_tokens * micro_batches * (shares - 1) // shares
        return sent // self.train.num_workers

    def states(self, zero_stage: int, offload: str) -> Memory:
        """Memory of weights, gradients and optimizer on each GPU."""
        averages = self.train.ema_decay is not None
        return model_states(self.size, self.train.num_workers, zero_stage, offload, averages)

    def seconds(self, gradient_checkpointing: bool) -> float:
        """Duration of a step, at the speed that is assumed."""
        flops = self.flops + (self.recomputed_flops if gradient_checkpointing else 0)
        return flops / self.train.num_workers / _ASSUMED_FLOPS

    @property
    def zero_stages(self) -> range:
        """Those that this configuration can be trained with."""
        return range(4) if self.train.storage_dtype is None else range(3)

    def advice(self, gpu_memory: float) -> Way | None:
        """The fastest way that fits into `gpu_memory` bytes; None if none does."""
        sizes = [size for size in self.sharing_sizes if self.train.sequence_parallel <= size]
        near = [size for size in sizes if size <= max(_GPUS_OF_A_NODE, self.train.sequence_parallel)]
        ways = [replace(way, sequence_parallel=size) for size in near for way in WAYS]
        ways = [way for way in ways if way.fits(self.train)]
        ways.sort(key=lambda way: way.offload != "none")
        return next((way for way in ways if self.total(way) <= USABLE * gpu_memory), None)


def run(config: Config, gpu_memory_gb: float, price: float | None = None) -> None:
    """Prints the plan for `train.num_workers` GPUs of this much memory, at this price of an hour of one.

    Raises:
        ProPhyError: backbone or VLM is neither a published one nor a folder, and the hub cannot be reached;
            `train.expert` or `train.noise_levels` does not fit it; its VAE or patches do not fit a shape of
            clips; or `train.sequence_parallel` GPUs cannot share a sample.
    """
    plan, console = make_plan(config), Console()
    train, size, gpu_memory = plan.train, plan.size, gpu_memory_gb * 1e9
    num_frames, height, width = plan.clip
    shared = "" if train.sequence_parallel == 1 else f", each {train.sequence_parallel} of which share them,"
    console.print(
        f"{config.backbone.pretrained}: {_billions(size.backbone)} parameters, and {_billions(size.branch)} "
        f"of the branch; {_billions(size.trained)} are trained\n"
        f"the largest sample, {num_frames} frames of {height}x{width}, has {plan.num_tokens:,} tokens, "
        f"and {plan.text_length} of text; all are counted as that\n"
        f"a step of {train.global_batch_size} samples, {train.gradient_accumulation_steps} micro-batches of "
        f"{train.micro_batch_size} on each of {train.num_workers} GPUs{shared}, takes "
        f"{plan.flops / 1e15:.3g} PFLOP: "
        f"{plan.seconds(False):.3g} s if each GPU does {_ASSUMED_FLOPS / 1e12:.0f} TFLOP/s, and "
        f"{plan.recomputed_flops / plan.flops:.0%} more with gradient checkpointing; "
        f"{plan.routing_flops / plan.flops:.1%} of it is routing ahead for load balancing over the global "
        f"batch, which keeps no activations\n",
        highlight=False,
    )
    console.print(_table(plan, gpu_memory))
    way = plan.advice(gpu_memory)
    if way is None:
        console.print("nothing fits: take more GPUs or larger ones, smaller clips, or fewer physics_layers")
    else:
        console.print(f"advice: {way.overrides(train)}", highlight=False, soft_wrap=True)
        days = train.num_steps * plan.seconds(way.gradient_checkpointing) / 86400
        hours = 24 * days * train.num_workers
        if way.sequence_parallel > 1:
            console.print(
                f"each {way.sequence_parallel} GPUs share a sample, and each of them sends "
                f"{_gb(plan.exchanged(way))} GB to the others in a step: let them be of one node",
                highlight=False,
            )
        console.print(
            f"{train.num_steps:,} steps then take {days:.3g} days: {_gpu_hours(hours, price)}",
            highlight=False,
        )
    _print_vlm(config, price)
    _print_footprint(plan.footprint, gpu_memory, price)


def _print_vlm(config: Config, price: float | None) -> None:
    vlm, pool, batch_size = config.vlm, config.cache.extract, config.cache.extract_batch_size
    cost = vlm_cost(
        published_or_loaded(vlm.pretrained, vlm.revision),
        vlm.dtype,
        load_taxonomy(config.taxonomy),
        (vlm.num_frames, vlm.height, vlm.width),
        None if vlm.layers is None else len(vlm.layers),
        vlm.max_new_tokens,
    )
    if cost is None:
        told = f"what the VLM in {vlm.pretrained} takes is not known: its class is of another package"
    else:
        seconds = cost.seconds(batch_size, _ASSUMED_FLOPS, _ASSUMED_BYTES)
        hours = 1000 * seconds * max(1, pool.num_gpus) / 3600
        told = (
            f"priors take {_gb(cost.weights)} GB of a GPU for the VLM of {_billions(cost.num_parameters)} "
            f"parameters, and more for each clip, of {cost.num_tokens:,} tokens and "
            f"{cost.flops / 1e12:.3g} TFLOP; 1,000 clips, {batch_size} at once, take "
            f"{_gpu_hours(hours, price)}, if a GPU reads {_ASSUMED_BYTES / 1e12:g} TB/s of its memory, clips "
            f"have {NUM_PHENOMENA} phenomena and no labels, and of the answers of a batch one has all "
            f"{vlm.max_new_tokens} tokens"
        )
    Console().print(told, highlight=False)


def _print_footprint(parts: Footprint, gpu_memory: float, price: float | None) -> None:
    vae, text = parts.vae, parts.text_encoder
    text_gb = "of unknown size" if text is None else _gb(text)
    hours = 1000 * vae.encode_flops / _ASSUMED_FLOPS / 3600
    size = parts.processes_per_replica
    shared = f", on each of {size} that share a video" if size > 1 else ""
    held = "transformer" if parts.num_transformers == 1 else "two transformers, each with a branch,"
    encodes, serves = (
        f"{_gb(value)} GB of a GPU ({'fits' if value <= USABLE * gpu_memory else 'does not fit'})"
        for value in (parts.encoding, parts.serving)
    )
    Console().print(
        f"encoding takes {encodes}: text encoder {text_gb}, VAE {_gb(vae.weights)}, and {_gb(vae.encode)} "
        f"for a clip of {vae.encode_flops / 1e12:.0f} TFLOP; 1,000 clips take {_gpu_hours(hours, price)}\n"
        f"serving takes {serves}{shared}: {held} {_gb(parts.transformers)}, text encoder {text_gb}, VAE "
        f"{_gb(vae.weights)}, and the larger of denoising {_gb(parts.denoising)}* and decoding "
        f"{_gb(vae.decode)}",
        highlight=False,
    )


def _gpu_hours(hours: float, price: float | None) -> str:
    money = "" if price is None else f", {hours * price:,.2f} at {price:g} an hour"
    return f"{hours:,.3g} GPU hours{money}"


def make_plan(config: Config) -> Plan:
    """Builds the model on the meta device and counts.

    Raises:
        ProPhyError: as `run`.
    """
    backbone, train = config.backbone, config.train
    family = FAMILIES[backbone.family]
    pipeline_config, vae, transformer_config = _configs(config)
    served = family.latent_shape(
        backbone.num_frames, backbone.height, backbone.width, vae, transformer_config
    )
    num_served = prod(family.token_grid(served, transformer_config))
    physics = branch_config(config.physics, served, load_taxonomy(config.taxonomy).names)
    shapes = shapes_by_clip(config, vae, transformer_config)
    sizes = sharing_sizes(config, transformer_config, shapes)
    clip, largest = max(shapes.items(), key=lambda item: prod(item[1].token_grid))
    num_tokens, latents = prod(largest.token_grid), largest.latents[1:]
    with torch.device("meta"):
        transformer = family.classes().prophy_transformer.from_config(
            {**transformer_config, "physics": physics.model_dump(mode="json")}
        )
    if train.backbone == "lora":
        transformer.add_lora(train.lora_rank, train.lora_alpha)
    transformer.train_backbone(train.backbone)
    text = family.text(transformer.config, backbone.max_sequence_length)
    text |= family.image(transformer.config, latents)
    timestep = (num_tokens,) if family.images(pipeline_config, transformer_config) == "first_latent" else ()
    work = (transformer, train.micro_batch_size, largest.latents, text, timestep)
    routing_flops = 0
    if transformer.physics_branch.refinement is not None and train.gradient_accumulation_steps > 1:
        ahead = (train.gradient_accumulation_steps - 1) * train.data_parallel_size
        routing_flops = count_forward_flops(*work, method="route") * ahead
    size = _size(transformer, getattr(torch, backbone.dtype), train.storage_dtype is not None)
    kept = count_saved_bytes(*work)
    saved = kept * (2 if train.precision == "fp32" else 1)
    # Autocast keeps a copy of each trained weight until the forward pass ends, or is saved for the backward.
    copies = size.trained * (0 if train.precision == "fp32" else torch.bfloat16.itemsize)
    checkpointed = _checkpointed(transformer, saved, num_tokens, train)
    micro_batches = train.gradient_accumulation_steps * train.data_parallel_size
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    num_physical = len(transformer.physics_branch.blocks)
    blocks = transformer.config.num_layers + num_physical
    attended = num_tokens + (backbone.max_sequence_length if family.has_text_stream else 0)
    item = 4 if train.precision == "fp32" else 2
    recomputed = count_forward_flops(*work)
    if train.keep_attention:  # scores, and the sums of values
        recomputed -= blocks * 4 * train.micro_batch_size * num_tokens**2 * width
    return Plan(
        train=train,
        size=size,
        clip=clip,
        num_tokens=num_tokens,
        text_length=backbone.max_sequence_length,
        flops=count_flops(*work) * micro_batches + routing_flops,
        routing_flops=routing_flops,
        recomputed_flops=recomputed * micro_batches,
        token_bytes={False: saved, True: checkpointed},
        copies=copies,
        block_tokens=blocks * train.micro_batch_size * attended * width * item,
        sharing_sizes=sizes,
        footprint=footprint(
            backbone,
            vae,
            clip,
            serve=config.serve,
            num_transformers=len(family.experts(pipeline_config)),
            num_blocks=transformer.config.num_layers,
            backbone_parameters=size.backbone,
            branch_parameters=size.branch,
            block_bytes=kept * num_served // num_tokens // blocks // train.micro_batch_size,
            token_bytes=num_served * width * torch.bfloat16.itemsize,
            num_physical_blocks=num_physical,
        ),
    )


def _configs(config: Config) -> tuple[ModelConfig, ModelConfig, ModelConfig]:
    """Configurations of pipeline, VAE and transformer: those of a published model come with the product."""
    backbone, family, train = config.backbone, FAMILIES[config.backbone.family], config.train
    if backbone.pretrained not in family.published:
        model = (backbone.family, backbone.pretrained, backbone.revision)
        check_bare(*model)
        expert = load_trained_expert(*model, train.expert)
        expert.trained_levels(train.noise_levels)
        return load_all_configs(*model, expert.component)
    published = family.published[backbone.pretrained]
    expert = family.trained_expert(backbone.pretrained, published.pipeline, train.expert)
    expert.trained_levels(train.noise_levels)
    with torch.device("meta"):
        upstream = family.classes().transformer(**published.transformer)
    return published.pipeline, published.vae, dict(upstream.config)


def _size(transformer: PhysicsTransformer, dtype: torch.dtype, in_8_bits: bool) -> ModelSize:
    """As training has it: the backbone's precision or 8 bits where it is frozen, float32 what is trained."""
    stored = sum(layer.weight.numel() for layer in stored_layers(transformer)) if in_8_bits else 0
    branch = sum(parameter.numel() for parameter in transformer.physics_branch.parameters())
    total = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return ModelSize(
        backbone=total - branch,
        branch=branch,
        trained=trained,
        trained_bytes=torch.float32.itemsize,
        frozen_bytes=(total - trained - stored) * dtype.itemsize + stored,
    )


def _checkpointed(transformer: PhysicsTransformer, saved: int, num_tokens: int, train: TrainConfig) -> int:
    """Every block's input and every residual, and the inside of one block, which is computed again.

    And what self-attention gave in each block, with a float32 per head and token, where that is kept.
    """
    config = transformer.config
    num_layers, num_physical = config.num_layers, len(transformer.physics_branch.blocks)
    item = 4 if train.precision == "fp32" else 2
    rows = train.micro_batch_size * num_tokens
    tokens = rows * config.num_attention_heads * config.attention_head_dim * item
    kept = tokens + rows * config.num_attention_heads * 4 if train.keep_attention else 0
    blocks = num_layers + num_physical
    return (blocks + num_physical) * tokens + blocks * kept + saved // blocks


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
        if zero_stage not in plan.zero_stages:
            continue
        states = plan.states(zero_stage, offload)
        parts = [states.weights, states.gradients, states.optimizer, states.buffers, activations]
        total = states.total + activations
        fits = "yes" if total <= USABLE * gpu_memory else "no"
        table.add_row(str(zero_stage), offload, *map(_gb, parts), _gb(total), fits, _gb(states.host))
    return table


def _billions(number: int) -> str:
    return f"{number / 1e9:.3f}B"


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f}"
