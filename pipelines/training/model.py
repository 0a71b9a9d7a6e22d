"""The module that is trained: built without memory, then filled and sharded parameter by parameter.

A rank never holds more than its share, one whole parameter, and the new experts. It knows no Ray.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pipelines.config import Config
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.data import clip_shape
from pipelines.training.saving import EveryRankError
from pipelines.training.start import start_folder
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import (
    check_checkpoint,
    download,
    load_configs,
    load_trained_expert,
    takes_images,
)
from prophy.device import default_device, has_bfloat16
from prophy.errors import ProPhyError
from prophy.models.acceleration import accelerate, checkpoint_but_attention
from prophy.models.checkpoint import BranchCheckpoint, load_branch
from prophy.models.physics_config import BranchConfig, PhysicsConfig
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.weights import WeightFiles, empty_model, fill, keep
from prophy.training.module import ProPhyTrainModule

_TRANSFORMER = "transformer."  # begins the names of its parameters in the module


def build_module(
    config: Config,
    null_text: Mapping[str, torch.Tensor],
    phenomena: Sequence[str],
    checkpoint: Checkpoint | None = None,
    place: Callable[[nn.Parameter, torch.dtype], None] = keep,
) -> ProPhyTrainModule:
    """The backbone with the Physical Branch, and the losses around it; what is trained is float32.

    Args:
        config: the run's; its seed decides the parameters of a new branch and adapter.
        null_text: the empty prompt, encoded (`PriorCache.null_text`).
        phenomena: the cache's, in the order of its labels and maps.
        checkpoint: what to resume from.
        place: see `fill`.

    Raises:
        ProPhyError: the branch to start from is of another backbone, or of another shape, or as
            `start_folder`; the checkpoint holds other parameters; or `train.expert` or `train.noise_levels`
            does not fit the backbone.
    """
    backbone, train = config.backbone, config.train
    expert = load_trained_expert(backbone.family, backbone.pretrained, backbone.revision, train.expert)
    parts = ["model_index.json", "scheduler/*", f"{expert.component}/*"]
    folder = download(backbone.pretrained, backbone.revision, parts)
    transformer = _empty_transformer(config, phenomena, expert.component)
    branch = start_folder(train)
    start = None if branch is None else _start(config, phenomena, branch)
    module = ProPhyTrainModule(
        transformer,
        FAMILIES[backbone.family]
        .classes()
        .objective.from_scheduler(
            _scheduler_config(folder / "scheduler"), expert.trained_levels(train.noise_levels)
        ),
        null_text,
        train.loss_weights,
        train.reduction,
        train.alignment,
        train.gradient_accumulation_steps,
        takes_images(backbone.family, backbone.pretrained, backbone.revision) == "first_latent",
    )
    if checkpoint is not None:
        _check_shapes(module, checkpoint)

    files = WeightFiles(folder / expert.component)

    def read(name: str) -> torch.Tensor | None:
        if checkpoint is not None and name in checkpoint.shapes:
            return checkpoint.tensor("parameter", name)
        name = name.removeprefix(_TRANSFORMER)
        if start is not None and name in start.state_dict:
            return start.state_dict[name]
        source = transformer.backbone_name(name)
        return None if source is None else files.read(source)

    fill(module, read, place)
    return module


def share_samples(transformer: PhysicsTransformer, num_ranks: int) -> None:
    """Has each `num_ranks` successive ranks of the default group compute samples together."""
    num_groups = dist.get_world_size() // num_ranks
    names = ("samples", "ring", "ulysses")
    mesh = init_device_mesh(default_device().type, (num_groups, 1, num_ranks), mesh_dim_names=names)
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=num_ranks, mesh=mesh))


def branch_config(
    physics: PhysicsConfig, latent_shape: Sequence[int], phenomena: Sequence[str]
) -> BranchConfig:
    """The branch that a run trains, for clips whose latents have this (T, H, W)."""
    return BranchConfig(**physics.model_dump(), latent_shape=[*latent_shape], phenomena=[*phenomena])


def _branch_of(config: Config, phenomena: Sequence[str]) -> BranchConfig:
    clip = config.backbone
    shape = clip_shape(clip, clip.num_frames, clip.height, clip.width)
    return branch_config(config.physics, shape.latents[1:], phenomena)


def _scheduler_config(folder: Path) -> Mapping[str, Any]:
    """The pipeline's scheduler's, with the defaults of its class."""
    settings = json.loads((folder / "scheduler_config.json").read_text())
    return getattr(diffusers, settings["_class_name"]).from_config(settings).config


def _empty_transformer(config: Config, phenomena: Sequence[str], component: str) -> PhysicsTransformer:
    """Backbone and copied blocks are on the meta device; the rest of branch and adapter is new, and real."""
    backbone, train = config.backbone, config.train
    classes = FAMILIES[backbone.family].classes()
    _, settings = load_configs(backbone.family, backbone.pretrained, backbone.revision, component)
    exact = train.backbone == "full" or not has_bfloat16(default_device())
    dtype = torch.float32 if exact else getattr(torch, backbone.dtype)
    upstream = empty_model(classes.transformer, settings, dtype)
    torch.manual_seed(train.seed)
    physics = _branch_of(config, phenomena)
    transformer = classes.prophy_transformer.from_transformer(upstream, physics.model_dump())
    transformer.physics_branch.float()
    if train.backbone == "lora":
        transformer.add_lora(train.lora_rank, train.lora_alpha)
    transformer.train_backbone(train.backbone)
    if train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(checkpoint_but_attention if train.keep_attention else None)
    accelerate(transformer, backbone.attention, backbone.compile)
    return transformer


def _start(config: Config, phenomena: Sequence[str], folder: Path) -> BranchCheckpoint:
    """The trained branch that a run goes on from, which lies in `folder`.

    Raises:
        ProPhyError: it is of another backbone or shape, or has another adapter.
    """
    train = config.train
    check_checkpoint(folder, config.backbone.pretrained, config.backbone.revision)
    start = load_branch(folder)
    theirs = BranchConfig.read(start.physics).model_dump()
    ours = _branch_of(config, phenomena).model_dump()
    if start.lora is not None:
        theirs["lora"] = start.lora
        lora = {"rank": train.lora_rank, "alpha": train.lora_alpha}
        ours["lora"] = lora if train.backbone == "lora" else None
    for name, value in theirs.items():
        if ours[name] != value:
            raise ProPhyError(
                f"the branch in {folder} has {name} {value}, and this run {ours[name]}; make them equal, or "
                f"set train.start_from=null for a new branch"
            )
    return start


def _check_shapes(module: nn.Module, checkpoint: Checkpoint) -> None:
    trained = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    if checkpoint.shapes != trained:
        raise EveryRankError(
            f"{checkpoint.place} has other parameters than this configuration trains; choose another run_dir"
        )
