"""What a complete export says of itself: the card that lies beside the model."""

from pathlib import Path

from pipelines.config import Config
from pipelines.training.checkpoint import Checkpoint
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import is_hub_id, takes_images
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.physics_transformer import BRANCH

TRANSFORMER = "transformer."
"""Begins the names of its parameters in training."""


def pipeline_class(config: Config) -> type[PhysicsPipeline]:
    """That which loads a complete export."""
    backbone = config.backbone
    images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
    return FAMILIES[backbone.family].classes().pipeline_for(images)


def backbone_says(checkpoint: Checkpoint) -> str:
    """What became of the backbone's weights."""
    if lora := checkpoint.run["lora"]:
        rank, alpha = lora["rank"], lora["alpha"]
        return f"are unchanged, beside an adapter (LoRA) of rank {rank} and alpha {alpha}, which is not fused"
    if all(name.startswith(TRANSFORMER + BRANCH) for name in checkpoint.shapes):
        return "are unchanged"
    return "were trained too, and are float32"


def model_card(config: Config, checkpoint: Checkpoint, num_branches: int) -> str:
    """The card of a complete export, in Markdown.

    Args:
        config: the run.
        checkpoint: what it trained.
        num_branches: how many of the backbone's transformers have a branch in it.
    """
    backbone, physics = checkpoint.run["backbone"], checkpoint.run["physics"]
    name, revision, expert = backbone["name"], backbone["revision"], backbone.get("expert")
    whose = "" if expert is None else f" of the transformer for {expert.replace('_', ' ')}"
    another = "\nThe other transformer has a branch of its own, of another run." if num_branches > 1 else ""
    pipeline = pipeline_class(config)
    kind = "text" if pipeline is FAMILIES[config.backbone.family].classes().pipeline else "image"
    base_model = f"base_model: {name}\n" if is_hub_id(str(name)) else ""
    blocks = (
        f"Physical Blocks beside the layers {physics['physics_layers']},"
        if physics["physical_blocks"]
        else "No Physical Blocks,"
    )
    return f"""---
library_name: diffusers
pipeline_tag: {kind}-to-video
{base_model}---
# {Path(str(name)).name} with a Physical Branch (ProPhy)

Trained for {checkpoint.step} steps with `prophy train` on {name}{f" at {revision}" if revision else ""}; the
backbone's weights{whose} {backbone_says(checkpoint)}. {blocks}
{physics["num_semantic_experts"]} semantic and {physics["num_refinement_experts"]} refinement experts
({physics["top_k"]} per token). The method is that of https://arxiv.org/abs/2512.05564. The backbone's licence
holds for its weights.{another}

```python
from {pipeline.__module__} import {pipeline.__name__}

pipeline = {pipeline.__name__}.from_pretrained("this/folder")
```
"""
