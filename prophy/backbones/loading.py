"""Loads a backbone's pipeline, with or without a trained Physical Branch."""

import inspect
from pathlib import Path
from typing import Any

import torch

from prophy.backbones.families import FAMILIES
from prophy.backbones.placement import Placement
from prophy.backbones.pretrained import (
    check_checkpoint,
    load_experts,
    resolve_pretrained,
    takes_images,
    unloadable,
)
from prophy.device import default_device, has_bfloat16
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.checkpoint import load_branch
from prophy.models.description import branches_in
from prophy.models.physics_transformer import BRANCH


def vae_dtype(family: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of the VAE beside a transformer of `dtype`.

    float32 where upstream recommends it, as for Wan, and where the device would emulate another.
    """
    return torch.float32 if FAMILIES[family].float32_vae or not has_bfloat16(device) else dtype


def tile_large_frames(vae: Any) -> None:
    """Has CogVideoX's VAE work in tiles of the size that it was made for, where a frame is larger.

    81 frames of 768x1360 at once take 96 GB in float32 to decode, and 48 in bfloat16.
    """
    vae.enable_tiling(vae.config.sample_height, vae.config.sample_width)


def load_pipeline(
    family: str,
    pretrained: str,
    revision: str | None,
    dtype: torch.dtype,
    checkpoint: Path | None,
    placement: Placement = Placement(),
    **components: Any,
) -> PhysicsPipeline:
    """Loads a backbone's pipeline, with the branch of `checkpoint` if one is given.

    What the checkpoint holds of the backbone takes the place of what it was; an adapter stays beside it, as
    in training. Of a backbone with two transformers, one without a branch of its own stays as it was. A VAE
    that can tile works on no more pixels at once than it was made for. What encodes an image is float32.

    Args:
        family: key of `FAMILIES`.
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.
        dtype: precision of transformer and text encoder, and of the VAE where `vae_dtype` says so.
        checkpoint: folder that `save_branch` wrote, or `branches_in` knows.
        placement: where it computes, the CPU by default; the weights are read to there at once.
        components: components to use instead of the pretrained ones; None leaves one out. Those that the
            model does not have are passed by.

    Raises:
        ProPhyError: there is no such model or checkpoint, the family cannot run this model, or the checkpoint
            belongs to another backbone.
    """
    classes = FAMILIES[family].classes()
    pipeline_class = classes.pipeline_for(takes_images(family, pretrained, revision))
    if checkpoint is not None:
        check_checkpoint(checkpoint, pretrained, revision)
    experts = load_experts(family, pretrained, revision)
    branches = {
        experts[name].component: load_branch(folder)
        for name, folder in ({} if checkpoint is None else branches_in(checkpoint)).items()
    }
    try:
        pipeline = pipeline_class.from_pretrained(
            resolve_pretrained(pretrained),
            revision=revision,
            dtype={
                "default": dtype,
                "vae": vae_dtype(family, dtype, default_device()),
                "image_encoder": torch.float32,
            },
            device_map=placement.loaded_on.type,
            **{name: value for name, value in components.items() if name in _components(pipeline_class)},
        )
    except OSError:
        raise unloadable(pretrained) from None
    if not FAMILIES[family].float32_vae and pipeline.vae is not None:
        tile_large_frames(pipeline.vae)
    for component, branch in branches.items():
        transformer = classes.prophy_transformer.from_transformer(
            getattr(pipeline, component), branch.physics
        )
        if branch.lora is not None:
            transformer.add_lora(**branch.lora, dtype=dtype)
        missing, unexpected = transformer.load_state_dict(branch.state_dict, strict=False)
        assert not unexpected and not any(name.startswith(BRANCH) or "lora_" in name for name in missing)
        pipeline.register_modules(**{component: transformer.eval()})
    placement.apply(pipeline, dtype)
    return pipeline


def _components(pipeline: type[PhysicsPipeline]) -> set[str]:
    """Names of what a pipeline is made of."""
    return {*inspect.signature(pipeline.__init__).parameters}
