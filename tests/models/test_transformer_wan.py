"""The transformer with its branch, beside upstream's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from prophy.errors import ProPhyError
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel

from .conftest import PHYSICS, WAN

Inputs = dict[str, torch.Tensor]


def test_untrained_equals_a_bfloat16_backbone(tmp_path: Path, inputs: Inputs) -> None:
    WanTransformer3DModel(**WAN).save_pretrained(tmp_path)
    backbone = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    transformer = ProPhyWanTransformer3DModel.from_transformer(backbone, PHYSICS)
    inputs = {name: value if name == "timestep" else value.bfloat16() for name, value in inputs.items()}
    assert torch.equal(transformer(**inputs).sample, backbone(**inputs).sample)
    block = transformer.physics_branch.blocks[0].block
    assert block.norm2.weight.dtype == torch.float32  # what upstream keeps in float32, the copies keep too
    assert block.attn1.to_q.weight.dtype == torch.bfloat16


def test_residuals_are_added_after_the_listed_blocks(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    """Branch and backbone written out one after the other, in plain steps."""
    model: Any = awakened
    branch, latents = model.physics_branch, inputs["hidden_states"]
    rotary = model.rope(latents)
    temb, time, text, _ = model.condition_embedder(inputs["timestep"], inputs["encoder_hidden_states"])
    time = time.view(2, 6, -1)

    mixture, _ = branch.semantic(inputs["encoder_hidden_states"], latents.shape[2:])
    physics = model.patch_embedding(latents + mixture).flatten(2).mT
    first = branch.blocks[0].block(physics, text, time, rotary)
    second = branch.blocks[1].block(first, text, time, rotary)
    refined = branch.refinement_injection(branch.refinement(second)[0])

    tokens = model.patch_embedding(latents).flatten(2).mT
    tokens = model.blocks[0](tokens, text, time, rotary) + branch.blocks[0].injection(first)
    tokens = model.blocks[1](tokens, text, time, rotary)
    tokens = model.blocks[2](tokens, text, time, rotary) + branch.blocks[1].injection(second) + refined
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
    patches = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift).view(2, 2, 2, 3, 2, 2, 4)
    expected = torch.zeros_like(latents)
    for row in range(2):
        for column in range(2):
            expected[..., row::2, column::2] = patches[:, :, :, :, row, column].permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(model(**inputs).sample, expected)


def test_an_image_to_video_backbone_is_refused(backbone: WanTransformer3DModel) -> None:
    backbone.register_to_config(image_dim=8)
    with pytest.raises(ProPhyError, match="image-to-video"):
        ProPhyWanTransformer3DModel.from_transformer(backbone, PHYSICS)
