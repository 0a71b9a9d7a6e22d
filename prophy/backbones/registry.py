"""Which classes belong together, per family of video diffusion transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    ModelMixin,
    WanTransformer3DModel,
)

from prophy.backbones.families import FAMILIES, Family
from prophy.backbones.pretrained import check_checkpoint, resolve_pretrained, unloadable
from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.checkpoint import load_branch
from prophy.models.physics_transformer import BRANCH, PhysicsTransformer
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.training.objectives import FlowMatching, Objective, VPrediction


@dataclass(frozen=True)
class Backbone(Family):
    """A family and its classes.

    Attributes:
        transformer: diffusers' class.
        prophy_transformer: ours, with a Physical Branch.
        pipeline: ours; it takes either transformer.
        vae: diffusers' class.
        objective: what the transformer is trained to predict.
    """

    transformer: type[ModelMixin]
    prophy_transformer: type[PhysicsTransformer]
    pipeline: type[DiffusionPipeline]
    vae: type[ModelMixin]
    objective: type[Objective]


BACKBONES: dict[str, Backbone] = {
    "wan": Backbone(
        **vars(FAMILIES["wan"]),
        transformer=WanTransformer3DModel,
        prophy_transformer=ProPhyWanTransformer3DModel,
        pipeline=ProPhyWanPipeline,
        vae=AutoencoderKLWan,
        objective=FlowMatching,
    ),
    "cogvideox": Backbone(
        **vars(FAMILIES["cogvideox"]),
        transformer=CogVideoXTransformer3DModel,
        prophy_transformer=ProPhyCogVideoXTransformer3DModel,
        pipeline=ProPhyCogVideoXPipeline,
        vae=AutoencoderKLCogVideoX,
        objective=VPrediction,
    ),
}


def load_pipeline(
    family: str,
    pretrained: str,
    revision: str | None,
    dtype: torch.dtype,
    checkpoint: Path | None,
    **components: Any,
) -> DiffusionPipeline:
    """Loads a backbone's pipeline, with the branch of `checkpoint` if one is given.

    What the checkpoint holds of the backbone takes the place of what it was: an adapter is fused. The VAE
    stays in float32, as upstream recommends for Wan.

    Args:
        family: key of `BACKBONES`.
        pretrained: see `resolve_pretrained`.
        revision: of a hub id.
        dtype: of transformer and text encoder.
        checkpoint: folder that `save_branch` wrote.
        components: components to use instead of the pretrained ones; None leaves one out.

    Raises:
        ProPhyError: there is no such model or checkpoint, or the checkpoint belongs to another backbone.
    """
    backbone = BACKBONES[family]
    if checkpoint is not None:
        check_checkpoint(checkpoint, pretrained, revision)
    branch = None if checkpoint is None else load_branch(checkpoint)
    try:
        pipeline = backbone.pipeline.from_pretrained(
            resolve_pretrained(pretrained),
            revision=revision,
            dtype={"default": dtype, "vae": torch.float32},
            **components,
        )
    except OSError:
        raise unloadable(pretrained) from None
    if branch is not None:
        transformer = backbone.prophy_transformer.from_transformer(pipeline.transformer, **branch.physics)
        if branch.lora is not None:
            transformer.add_lora(**branch.lora)
        missing, unexpected = transformer.load_state_dict(branch.state_dict, strict=False)
        assert not unexpected and not any(name.startswith(BRANCH) or "lora_" in name for name in missing)
        if branch.lora is not None:
            transformer.fuse_lora()
            transformer.unload_lora()
        pipeline.register_modules(transformer=transformer.eval())
    return pipeline
