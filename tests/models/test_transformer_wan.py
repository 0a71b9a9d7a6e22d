"""The transformer with its branch, beside upstream's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from prophy.models.control import PhysicsControl, PhysicsTrace
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


def test_blocks_that_read_the_backbone_take_the_output_of_their_layer(
    reading: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    """The blocks written out, in plain steps."""
    model: Any = reading
    branch, latents = model.physics_branch, inputs["hidden_states"]
    _, time, text, _ = model.condition_embedder(inputs["timestep"], inputs["encoder_hidden_states"])
    conditions = text, time.view(2, 6, -1), model.rope(latents)
    mixture, _ = branch.semantic(inputs["encoder_hidden_states"], latents.shape[2:])

    tokens = model.blocks[0](model._embed_patches(latents), *conditions)
    first = branch.blocks[0].block(tokens + model._embed_mixture(mixture), *conditions)
    tokens = model.blocks[1](tokens + branch.blocks[0].injection(first), *conditions)
    tokens = model.blocks[2](tokens, *conditions)
    second = branch.blocks[1].block(tokens, *conditions)
    refined, logits, _ = branch.refinement(second)
    expected = tokens + branch.blocks[1].injection(second) + branch.refinement_injection(refined)

    seen: list[torch.Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda _, args: seen.append(*args))
    routing = model(**inputs).routing
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(routing.refinement_logits, logits)


def of_each_token(inputs: Inputs) -> Inputs:
    """The same inputs, where the first latent frame is given: its 6 of the 12 tokens have timestep 0."""
    timesteps = inputs["timestep"][:, None].float().repeat(1, 12)
    timesteps[:, :6] = 0
    return inputs | {"timestep": timesteps}


def test_untrained_equals_the_backbone_at_timesteps_of_each_token(
    backbone: WanTransformer3DModel, transformer: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    given = of_each_token(inputs)
    expected = backbone(**given).sample
    assert not torch.equal(expected, backbone(**inputs).sample)
    assert torch.equal(transformer(**given).sample, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformer(**given).sample, backbone(**given).sample)


def test_one_timestep_for_all_tokens_is_that_of_the_sample(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    repeated = inputs | {"timestep": inputs["timestep"][:, None].float().repeat(1, 12)}
    expected, output = awakened(**inputs), awakened(**repeated)
    torch.testing.assert_close(output.sample, expected.sample)
    torch.testing.assert_close(output.routing.phenomenon_maps, expected.routing.phenomenon_maps)


def test_the_branch_reads_the_timestep_of_each_token(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    given = of_each_token(inputs)
    routing, whole = awakened(**given).routing, awakened(**inputs).routing
    assert not torch.equal(routing.phenomenon_maps, whole.phenomenon_maps)
    text = {"prompt_embeds": given["encoder_hidden_states"]}
    alone = awakened.route(given["hidden_states"], given["timestep"], text)
    assert torch.equal(alone.phenomenon_maps, routing.phenomenon_maps)


def test_gradients_are_the_same_with_checkpointing_at_timesteps_of_each_token(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    def gradients() -> list[torch.Tensor]:
        awakened.zero_grad()
        awakened(**of_each_token(inputs)).sample.square().mean().backward()
        return [value.grad.clone() for value in awakened.parameters() if value.grad is not None]

    plain = gradients()
    awakened.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)


@torch.no_grad()
def test_a_trace_tells_steps_apart_whose_first_frame_is_given(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    trace, given = PhysicsTrace(), of_each_token(inputs)
    for factor in (1.0, 0.5):
        for _ in ("prompt", "guidance"):
            now = given | {"timestep": factor * given["timestep"]}
            awakened(**now, attention_kwargs={"physics": PhysicsControl(trace=trace)})
    assert trace.num_passes == 2


def of_an_image(inputs: Inputs) -> Inputs:
    """What `predict` takes beside latents and timestep: 512 tokens of text, and an image."""
    torch.manual_seed(3)
    return {
        "prompt_embeds": torch.randn(2, 512, 16),
        "image_latents": torch.randn_like(inputs["hidden_states"]),
        "image_embeds": torch.randn(2, 257, 8),
    }


@pytest.mark.parametrize("embeds", [True, False])  # Wan2.1 reads CLIP's too, Wan2.2 the latents alone
def test_a_model_of_images_reads_mask_and_latents_of_the_first_frame(inputs: Inputs, embeds: bool) -> None:
    torch.manual_seed(0)
    reads = {"image_dim": 8, "added_kv_proj_dim": 48} if embeds else {}
    backbone = WanTransformer3DModel(**WAN | {"in_channels": 4 + 4 + 4} | reads)
    model: Any = ProPhyWanTransformer3DModel.from_transformer(backbone, PHYSICS)
    latents, timestep, given = inputs["hidden_states"], inputs["timestep"], of_an_image(inputs)
    if not embeds:
        del given["image_embeds"]
    mask = torch.zeros(2, 4, 2, 4, 6)
    mask[:, :, 0] = 1
    read = torch.cat([latents, mask, given["image_latents"]], dim=1)
    expected = backbone(read, timestep, given["prompt_embeds"], given.get("image_embeds")).sample
    output = model.predict(latents, timestep, given)
    assert torch.equal(output.sample, expected) and output.sample.shape == latents.shape
    routing = model.route(latents, timestep, given)
    assert torch.equal(routing.phenomenon_maps, output.routing.phenomenon_maps)

    # The mixture of the semantic experts is added to the noisy latents, and to nothing of the image.
    assert model.physics_branch.semantic.basis_maps.shape[1] == 4
    mixture, _ = model.physics_branch.semantic(given["prompt_embeds"], latents.shape[2:])
    mixed = torch.cat([latents + mixture, read[:, 4:]], dim=1)
    torch.testing.assert_close(
        model._embed_patches(read) + model._embed_mixture(mixture), model._embed_patches(mixed)
    )
    for name in given:
        changed = model.predict(latents, timestep, given | {name: -given[name]})
        assert not torch.equal(changed.routing.phenomenon_maps, output.routing.phenomenon_maps)
