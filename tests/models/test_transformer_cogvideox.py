"""What only CogVideoX's transformer has: two streams, and positions of three kinds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from prophy.errors import ProPhyError
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel

from .conftest import PHYSICS, make_inputs

Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("family", ["cogvideox-2b"], indirect=True)
def test_the_branch_carries_its_own_text_and_injects_video_alone(
    awakened: ProPhyCogVideoXTransformer3DModel, inputs: Inputs
) -> None:
    """Branch and backbone written out one after the other, in plain steps."""
    model: Any = awakened
    branch = model.physics_branch
    latents, prompt = inputs["hidden_states"], inputs["encoder_hidden_states"]
    temb = model.time_embedding(model.time_proj(inputs["timestep"]))

    mixture, _ = branch.semantic(prompt, latents.transpose(1, 2).shape[2:])
    embedded = model.patch_embed(prompt, latents + mixture.transpose(1, 2))
    first, first_text = branch.blocks[0].block(embedded[:, 5:], embedded[:, :5], temb)
    second, _ = branch.blocks[1].block(first, first_text, temb)
    refined = branch.refinement_injection(branch.refinement(second)[0])

    embedded = model.patch_embed(prompt, latents)
    video, text = model.transformer_blocks[0](embedded[:, 5:], embedded[:, :5], temb)
    video = video + branch.blocks[0].injection(first)
    video, text = model.transformer_blocks[1](video, text, temb)
    video, text = model.transformer_blocks[2](video, text, temb)
    video = video + branch.blocks[1].injection(second) + refined
    patches = model.proj_out(model.norm_out(model.norm_final(video), temb=temb)).view(2, 2, 2, 3, 4, 2, 2)
    expected = torch.zeros_like(latents)
    for row in range(2):
        for column in range(2):
            expected[..., row::2, column::2] = patches[..., row, column].permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(model(**inputs).sample, expected)


@pytest.mark.parametrize("family", ["cogvideox-5b", "cogvideox1.5-5b"], indirect=True)
@pytest.mark.parametrize("size", [(2, 4, 6), (4, 8, 4)], ids=["native", "other"])
def test_positions_are_the_pipelines(
    transformer: ProPhyCogVideoXTransformer3DModel, size: tuple[int, int, int]
) -> None:
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    expected = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * size[1], 8 * size[2], size[0], torch.device("cpu")
    )
    for own, upstream in zip(transformer.rotary_embeddings(torch.zeros(1, 4, *size)), expected, strict=True):
        assert torch.equal(own, upstream)


@pytest.mark.parametrize("family", ["cogvideox-5b"], indirect=True)
def test_untrained_equals_a_bfloat16_backbone(backbone: CogVideoXTransformer3DModel) -> None:
    backbone.to(torch.bfloat16)
    transformer = ProPhyCogVideoXTransformer3DModel.from_transformer(backbone, PHYSICS)
    inputs = make_inputs(backbone, torch.randn(2, 4, 2, 4, 6).bfloat16())
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].bfloat16()
    assert torch.equal(transformer(**inputs).sample, backbone(**inputs).sample)


@pytest.mark.parametrize("family", ["cogvideox1.5-5b"], indirect=True)
def test_clips_without_positions_are_refused(transformer: ProPhyCogVideoXTransformer3DModel) -> None:
    with pytest.raises(ProPhyError, match="up to 8x8, not for 4x10"):
        transformer.rotary_embeddings(torch.zeros(1, 4, 2, 4, 10))
