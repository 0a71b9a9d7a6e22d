"""Frozen weights in 8 bits beside what is trained: what is computed, and what is kept for it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from prophy.models.eight_bits import keep_in, stored_layers
from prophy.models.physics_transformer import PhysicsTransformer

BITS = torch.float8_e4m3fn

pytestmark = pytest.mark.parametrize("family", ["wan", "cogvideox-5b"], indirect=True)


@pytest.fixture(params=["frozen", "lora"])
def training(request: pytest.FixtureRequest, awakened: PhysicsTransformer) -> PhysicsTransformer:
    if request.param == "lora":
        awakened.add_lora(rank=2, alpha=4)
        for name, parameter in awakened.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    awakened.train_backbone(request.param)
    return awakened


def in_8_bits(transformer: PhysicsTransformer) -> PhysicsTransformer:
    found = copy.deepcopy(transformer)
    keep_in(BITS, found)
    return found


def rounded(transformer: PhysicsTransformer) -> PhysicsTransformer:
    """The same weights where they are kept as they were."""
    found = copy.deepcopy(transformer)
    for layer in stored_layers(found):
        layer.weight.data = layer.weight.data.to(BITS).to(layer.weight.dtype)
    return found


def gradients(transformer: PhysicsTransformer, inputs: dict[str, Any]) -> list[torch.Tensor]:
    output = transformer(**inputs)
    (output.sample.square().mean() + output.routing.phenomenon_maps.square().mean()).backward()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    return [output.sample, *(value.grad for value in trained if value.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_learns_as_beside_the_rounded_weights(
    training: PhysicsTransformer, inputs: dict[str, Any], precision: torch.dtype, checkpointing: bool
) -> None:
    found = []
    for transformer in (in_8_bits(training), rounded(training)):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            found.append(gradients(transformer, inputs))
    assert len(found[0]) > 30
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_it_learns_nearly_as_beside_the_weights_themselves(
    training: PhysicsTransformer, inputs: dict[str, Any]
) -> None:
    """8 bits have 3 of mantissa: each weight changes by up to 6 %, and the gradient by little."""
    near, exact = (
        torch.cat([value.flatten() for value in gradients(transformer, inputs)[1:]])
        for transformer in (in_8_bits(training), copy.deepcopy(training))
    )
    changed = ((near - exact).norm() / exact.norm()).item()
    print(f"the gradient changes by {changed:.1%}")
    assert 0 < changed < 0.1


def num_copies(transformer: PhysicsTransformer, inputs: dict[str, Any]) -> int:
    """Matrices that are kept for the backward pass, as large as a stored weight, and no parameters."""
    sizes = {layer.weight.numel() for layer in stored_layers(transformer)}
    own = {value.untyped_storage().data_ptr() for value in transformer.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        transformer(**inputs)
    found = [tensor for tensor in kept if tensor.dim() == 2 and tensor.numel() in sizes]
    return sum(tensor.untyped_storage().data_ptr() not in own for tensor in found)


def test_no_weight_is_kept_in_more_bits(training: PhysicsTransformer, inputs: dict[str, Any]) -> None:
    transformer = in_8_bits(training)
    layers = list(stored_layers(transformer))
    assert len(layers) > 10 and all(layer.weight.dtype == BITS for layer in layers)
    assert num_copies(transformer, inputs) == num_copies(rounded(training), inputs)


def test_they_are_the_layers_of_blocks_in_which_videos_are_made_with_8_bits(
    training: PhysicsTransformer,
) -> None:
    stored = {id(layer) for layer in stored_layers(training)}
    served = copy.deepcopy(training)
    served.enable_layerwise_casting(storage_dtype=BITS, compute_dtype=torch.float32)
    own, theirs = (getattr(model, model._block_list).modules() for model in (training, served))
    layers = [pair for pair in zip(own, theirs, strict=True) if isinstance(pair[0], nn.Linear)]
    assert len(layers) >= len(stored) > 10
    for layer, other in layers:
        assert (other.weight.dtype == BITS) == (id(layer) in stored)
