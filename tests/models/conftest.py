"""A small Wan transformer and inputs for it."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from prophy.models.transformer_wan import ProPhyWanTransformer3DModel

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
PHYSICS: dict[str, Any] = {
    "physics_layers": (0, 2),
    "num_semantic_experts": 3,
    "num_refinement_experts": 4,
    "top_k": 2,
    "latent_shape": (2, 4, 6),
}


@pytest.fixture
def backbone() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**WAN)


@pytest.fixture
def transformer(backbone: WanTransformer3DModel) -> ProPhyWanTransformer3DModel:
    return ProPhyWanTransformer3DModel.from_transformer(backbone, **PHYSICS)


@pytest.fixture
def awakened(transformer: ProPhyWanTransformer3DModel) -> ProPhyWanTransformer3DModel:
    """A branch that injects something, as after training."""
    branch = transformer.physics_branch
    for projection in [*(block.injection for block in branch.blocks), branch.refinement_injection]:
        torch.nn.init.normal_(projection.weight, std=0.3)
        torch.nn.init.normal_(projection.bias, std=0.3)
    return transformer


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }
