"""The transformer with its branch, beside upstream's."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.taxonomy import PHENOMENA, Phenomenon

from .conftest import PHYSICS, WAN

Inputs = dict[str, torch.Tensor]


def controlled(model: ProPhyWanTransformer3DModel, inputs: Inputs, **control: object) -> torch.Tensor:
    kwargs = {"physics": PhysicsControl(**control)}
    with torch.no_grad():
        return model(**inputs, attention_kwargs=kwargs, return_dict=False)[0]


def test_untrained_equals_the_backbone_bit_for_bit(
    backbone: WanTransformer3DModel, transformer: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    expected = backbone(**inputs).sample
    assert expected.std() > 0.01
    assert torch.equal(transformer(**inputs).sample, expected)
    larger = inputs | {"hidden_states": torch.randn(2, 4, 3, 8, 4)}
    assert torch.equal(transformer(**larger).sample, backbone(**larger).sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformer(**inputs).sample, backbone(**inputs).sample)


def test_untrained_equals_a_bfloat16_backbone(tmp_path: Path, inputs: Inputs) -> None:
    WanTransformer3DModel(**WAN).save_pretrained(tmp_path)
    backbone = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    transformer = ProPhyWanTransformer3DModel.from_transformer(backbone, **PHYSICS)
    inputs = {name: value if name == "timestep" else value.bfloat16() for name, value in inputs.items()}
    assert torch.equal(transformer(**inputs).sample, backbone(**inputs).sample)
    block = transformer.physics_branch.blocks[0].block
    assert block.norm2.weight.dtype == torch.float32  # what upstream keeps in float32, the copies keep too
    assert block.attn1.to_q.weight.dtype == torch.bfloat16


def test_one_step_changes_the_output_and_the_second_reaches_everything(
    backbone: WanTransformer3DModel, transformer: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    transformer.freeze_backbone()
    optimizer = torch.optim.SGD([p for p in transformer.parameters() if p.requires_grad], lr=0.1)
    target, untrained = torch.randn_like(inputs["hidden_states"]), backbone(**inputs).sample

    def step() -> None:
        optimizer.zero_grad()
        output = transformer(**inputs)
        # The maps have no part in the prediction: they are what the token alignment trains.
        (
            torch.nn.functional.mse_loss(output.sample, target) + output.routing.phenomenon_maps.mean()
        ).backward()

    step()
    optimizer.step()
    assert not torch.equal(transformer(**inputs).sample, untrained)

    step()
    for name, parameter in transformer.named_parameters():
        if name.startswith("physics_branch."):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    experts = transformer(**inputs).routing.refinement_logits.topk(PHYSICS["top_k"]).indices.unique()
    assert all(transformer.physics_branch.refinement.weight.grad[expert].any() for expert in experts)


def test_backbone_keys_are_upstreams_and_the_rest_is_the_branch(
    backbone: WanTransformer3DModel, transformer: ProPhyWanTransformer3DModel
) -> None:
    own = transformer.state_dict()
    upstream = backbone.state_dict()
    assert {key for key in own if not key.startswith("physics_branch.")} == set(upstream)
    assert all(torch.equal(own[key], value) for key, value in upstream.items())


def test_physical_blocks_are_copies_of_the_listed_blocks(transformer: ProPhyWanTransformer3DModel) -> None:
    for own, layer in zip(transformer.physics_branch.blocks, PHYSICS["physics_layers"], strict=True):
        for name, parameter in transformer.blocks[layer].named_parameters():
            copied = own.block.get_parameter(name)
            assert torch.equal(copied, parameter) and copied.data_ptr() != parameter.data_ptr()


def test_residuals_are_added_after_the_listed_blocks(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    """Branch and backbone written out one after the other, in plain steps."""
    model, branch, latents = awakened, awakened.physics_branch, inputs["hidden_states"]
    rotary = model.rope(latents)
    temb, time, text, _ = model.condition_embedder(inputs["timestep"], inputs["encoder_hidden_states"])
    time = time.view(2, 6, -1)

    mixed, _ = branch.semantic(latents, inputs["encoder_hidden_states"])
    physics = model.patch_embedding(mixed).flatten(2).mT
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


def test_save_and_load(awakened: ProPhyWanTransformer3DModel, inputs: Inputs, tmp_path: Path) -> None:
    awakened.save_pretrained(tmp_path)
    loaded = ProPhyWanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).sample, awakened(**inputs).sample)
    assert loaded.config.num_layers == WAN["num_layers"]
    assert tuple(loaded.config.physics_layers) == PHYSICS["physics_layers"]


def test_scale_zero_is_the_backbone(
    backbone: WanTransformer3DModel, awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    output = awakened(**inputs, attention_kwargs={"physics": PhysicsControl(scale=0.0)})
    assert torch.equal(output.sample, backbone(**inputs).sample) and output.routing is None
    assert not torch.equal(controlled(awakened, inputs, scale=0.5), controlled(awakened, inputs))


def test_knobs(awakened: ProPhyWanTransformer3DModel, inputs: Inputs) -> None:
    plain = awakened(**inputs).sample
    assert torch.equal(controlled(awakened, inputs, strength=dict.fromkeys(PHENOMENA, 1.0)), plain)
    assert not torch.equal(controlled(awakened, inputs, strength={Phenomenon.COMBUSTION: 4.0}), plain)
    assert not torch.equal(controlled(awakened, inputs, invert_refinement=True), plain)

    silenced = controlled(awakened, inputs, strength=dict.fromkeys(PHENOMENA, 0.0))
    without = copy.deepcopy(awakened)
    for parameter in without.physics_branch.refinement_injection.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(silenced, without(**inputs).sample)


def test_trace_holds_the_maps_on_the_token_grid(
    transformer: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    trace = PhysicsTrace()
    controlled(transformer, inputs, trace=trace)
    maps = transformer(**inputs).routing.phenomenon_maps
    assert trace.phenomenon_maps.shape == (2, 2, 2, 3, 17)
    assert torch.equal(trace.phenomenon_maps.flatten(1, 3), maps)


def test_gradient_checkpointing_gives_the_same_gradients(
    awakened: ProPhyWanTransformer3DModel, inputs: Inputs
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        awakened.zero_grad()
        awakened(**inputs).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in awakened.named_parameters() if p.grad is not None}

    plain, calls = gradients(), []
    awakened.enable_gradient_checkpointing()
    for block in [*awakened.blocks, *awakened.physics_branch.blocks]:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    checkpointed = gradients()
    assert len(calls) == 2 * (len(awakened.blocks) + len(awakened.physics_branch.blocks))  # all run twice
    torch.testing.assert_close(checkpointed, plain)


def test_bad_backbones_are_refused(backbone: WanTransformer3DModel) -> None:
    with pytest.raises(ProPhyError, match="3 blocks"):
        ProPhyWanTransformer3DModel.from_transformer(backbone, **PHYSICS | {"physics_layers": (0, 3)})
    backbone.register_to_config(image_dim=8)
    with pytest.raises(ProPhyError, match="image-to-video"):
        ProPhyWanTransformer3DModel.from_transformer(backbone, **PHYSICS)
