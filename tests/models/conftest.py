"""Small transformers of every family and inputs for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, ModelMixin, WanTransformer3DModel

from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.wisa import PHENOMENA

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 3,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}
PHYSICS: dict[str, Any] = {
    "physics_layers": [0, 2],
    "num_semantic_experts": 3,
    "num_refinement_experts": 4,
    "top_k": 2,
    "latent_shape": [2, 4, 6],
    "phenomena": [*PHENOMENA],
}
BACKBONES: dict[str, tuple[type[ModelMixin], type[PhysicsTransformer], dict[str, Any]]] = {
    "wan": (WanTransformer3DModel, ProPhyWanTransformer3DModel, WAN),
    "cogvideox-2b": (CogVideoXTransformer3DModel, ProPhyCogVideoXTransformer3DModel, COGVIDEOX),
    "cogvideox-5b": (
        CogVideoXTransformer3DModel,
        ProPhyCogVideoXTransformer3DModel,
        COGVIDEOX | {"use_rotary_positional_embeddings": True},
    ),
    "cogvideox1.5-5b": (
        CogVideoXTransformer3DModel,
        ProPhyCogVideoXTransformer3DModel,
        COGVIDEOX
        | {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_width": 8,
            "sample_height": 8,
        },
    ),
}
"""By kind: diffusers' class, ours, and a small configuration."""
BASELINES: dict[str, dict[str, Any]] = {
    "lora": {"physical_blocks": False, "num_semantic_experts": 0, "num_refinement_experts": 0},
    "lora+seb": {"physical_blocks": False, "num_refinement_experts": 0},
    "lora+reb": {"physical_blocks": False, "num_semantic_experts": 0},
    "lora+seb+reb": {"physical_blocks": False},
    "lora+pb": {"num_semantic_experts": 0, "num_refinement_experts": 0},
    "lora+pb+seb+reb": {},
    "lora+pb+seb+reb, reading the backbone": {"blocks_read": "backbone"},
}
"""What of the branch there is, beside an adapter: the paper's ablation, and more."""


def make_inputs(backbone: ModelMixin, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the pipeline of `backbone` passes for latents `[2, C, T, H, W]`."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": latents,
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }
    if isinstance(backbone, CogVideoXTransformer3DModel):
        inputs["hidden_states"] = latents.transpose(1, 2)
        if backbone.config.use_rotary_positional_embeddings:
            pipeline = SimpleNamespace(transformer=backbone, vae_scale_factor_spatial=1)
            num_frames, height, width = latents.shape[2:]
            inputs["image_rotary_emb"] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                pipeline, height, width, num_frames, torch.device("cpu")
            )
    return inputs


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    """Key of `BACKBONES`."""
    return getattr(request, "param", "wan")


@pytest.fixture
def backbone(family: str) -> ModelMixin:
    torch.manual_seed(0)
    upstream, _, config = BACKBONES[family]
    return upstream(**config)


@pytest.fixture
def transformer(family: str, backbone: ModelMixin) -> PhysicsTransformer:
    return BACKBONES[family][1].from_transformer(backbone, PHYSICS)


@pytest.fixture
def awakened(transformer: PhysicsTransformer) -> PhysicsTransformer:
    """A branch that injects something, as after training."""
    return awaken(transformer)


@pytest.fixture
def reading(family: str, backbone: ModelMixin) -> PhysicsTransformer:
    """A branch that injects something, and whose blocks read the backbone's tokens."""
    return awaken(BACKBONES[family][1].from_transformer(backbone, PHYSICS | {"blocks_read": "backbone"}))


def awaken(transformer: PhysicsTransformer) -> PhysicsTransformer:
    """Has the branch inject something."""
    branch: Any = transformer.physics_branch
    for projection in [*(block.injection for block in branch.blocks), branch.refinement_injection]:
        torch.nn.init.normal_(projection.weight, std=0.3)
        torch.nn.init.normal_(projection.bias, std=0.3)
    return transformer


@pytest.fixture
def inputs(backbone: ModelMixin) -> dict[str, torch.Tensor]:
    return make_inputs(backbone, torch.randn(2, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1)))
