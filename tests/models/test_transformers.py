"""The transformers of all families with their branches, beside upstream's."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, ModelMixin, TaylorSeerCacheConfig

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.physics_transformer import PhysicsTransformer
from tests.wisa import PHENOMENA

from .conftest import BACKBONES, BASELINES, PHYSICS, make_inputs

pytestmark = pytest.mark.parametrize("family", BACKBONES, indirect=True)

Inputs = dict[str, torch.Tensor]


def text_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The text of these inputs as `predict` takes it."""
    return {"prompt_embeds": inputs["encoder_hidden_states"]}


TAYLORSEER = partial(TaylorSeerCacheConfig, use_lite_mode=True, taylor_factors_dtype=torch.float32)


def cast(value: object, dtype: torch.dtype) -> object:
    """Tensors of floating point, alone or in a tuple, in another precision."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def controlled(model: PhysicsTransformer, inputs: Inputs, **control: Any) -> torch.Tensor:
    kwargs = {"physics": PhysicsControl(**control)}
    with torch.no_grad():
        return model(**inputs, attention_kwargs=kwargs, return_dict=False)[0]


def test_untrained_equals_the_backbone_bit_for_bit(
    backbone: ModelMixin, transformer: PhysicsTransformer, inputs: Inputs
) -> None:
    expected = backbone(**inputs).sample
    assert expected.std() > 0.01
    assert torch.equal(transformer(**inputs).sample, expected)
    larger = make_inputs(backbone, torch.randn(2, 4, 4, 8, 4))
    assert torch.equal(transformer(**larger).sample, backbone(**larger).sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformer(**inputs).sample, backbone(**inputs).sample)


def test_one_step_changes_the_output_and_the_second_reaches_everything(
    backbone: ModelMixin, transformer: PhysicsTransformer, inputs: Inputs
) -> None:
    transformer.train_backbone("frozen")
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


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_start_as_the_backbone_and_learn_all_that_they_have(
    family: str, backbone: ModelMixin, inputs: Inputs, baseline: str
) -> None:
    untrained = backbone(**inputs).sample
    transformer = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES[baseline])
    transformer.add_lora(rank=4, alpha=8)
    transformer.train_backbone("lora")
    trained = {name: value for name, value in transformer.named_parameters() if value.requires_grad}
    assert {name for name in trained if not name.startswith("physics_branch.")} == {
        name for name, _ in transformer.named_parameters() if "lora_" in name
    }
    output = transformer(**inputs)
    assert torch.equal(output.sample, untrained)
    has = PHYSICS | BASELINES[baseline]
    assert (output.routing.semantic_weights is None) == (has["num_semantic_experts"] == 0)
    assert (output.routing.phenomenon_maps is None) == (has["num_refinement_experts"] == 0)

    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):  # the third reaches what lies behind two zeros: an adapter and an injection
        optimizer.zero_grad()
        output = transformer(**inputs)
        loss = output.sample.square().mean()
        if output.routing.phenomenon_maps is not None:
            loss = loss + output.routing.phenomenon_maps.mean()
        loss.backward()
        optimizer.step()
    assert not torch.equal(transformer(**inputs).sample, untrained)
    for name, value in trained.items():
        assert value.grad is not None and value.grad.any(), name


def test_knobs_of_experts_that_are_missing(family: str, backbone: ModelMixin, inputs: Inputs) -> None:
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES["lora+seb"])
    assert torch.equal(controlled(model, inputs, scale=0.5), backbone(**inputs).sample)
    with pytest.raises(ProPhyError, match="lacks semantic or refinement experts"):
        controlled(model, inputs, trace=PhysicsTrace())


def test_experts_without_blocks_give_maps(family: str, backbone: ModelMixin, inputs: Inputs) -> None:
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES["lora+seb+reb"])
    trace = PhysicsTrace()
    controlled(model, inputs, trace=trace)
    assert torch.equal(trace.phenomenon_maps.flatten(1, 3), model(**inputs).routing.phenomenon_maps)


def test_semantic_experts_without_blocks_hand_over_the_mixture(
    family: str, backbone: ModelMixin, inputs: Inputs
) -> None:
    """An injection that is the identity gives the backbone X~ instead of X (Eq. 1)."""
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES["lora+seb"])
    torch.nn.init.eye_(model.physics_branch.semantic_injection.weight)
    latents = inputs["hidden_states"]
    channels_first = latents if model._block_list == "blocks" else latents.transpose(1, 2)
    mixture, _ = model.physics_branch.semantic(inputs["encoder_hidden_states"], channels_first.shape[2:])
    mixed = channels_first + mixture
    expected = mixed if model._block_list == "blocks" else mixed.transpose(1, 2)
    torch.testing.assert_close(
        model(**inputs).sample, backbone(**inputs | {"hidden_states": expected}).sample
    )


def test_a_small_mixture_survives_bfloat16(family: str, backbone: ModelMixin, inputs: Inputs) -> None:
    """It is what X~ adds to the embedding of X, though either is rounded by more than that."""
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES["lora+seb"])
    injected: list[torch.Tensor] = []
    model.physics_branch.semantic_injection.register_forward_pre_hook(lambda _, args: injected.append(*args))
    latents = inputs["hidden_states"].double()
    video_first = model._block_list == "blocks"
    shape = latents.shape[2:] if video_first else latents.transpose(1, 2).shape[2:]
    mixture, _ = model.physics_branch.semantic(inputs["encoder_hidden_states"], shape)
    mixture = mixture if video_first else mixture.transpose(1, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        model.bfloat16()(**{name: cast(value, torch.bfloat16) for name, value in inputs.items()})
    exact = copy.deepcopy(backbone).double()
    text = inputs["encoder_hidden_states"].double()

    def embed(latents: torch.Tensor) -> torch.Tensor:
        if video_first:
            return exact.patch_embedding(latents).flatten(2).transpose(1, 2)
        return exact.patch_embed(text, latents)[:, text.shape[1] :]

    expected = embed(latents + mixture) - embed(latents)
    assert expected.norm() < 0.05 * embed(latents).norm()
    for value in injected:
        assert (value - expected).norm() < 0.01 * expected.norm()


def test_routing_alone_runs_no_block_of_the_backbone(awakened: PhysicsTransformer, inputs: Inputs) -> None:
    latents = torch.randn(2, 4, 2, 4, 6)
    arguments = (latents, inputs["timestep"], text_of(inputs))
    expected = awakened.predict(*arguments).routing
    for block in getattr(awakened, awakened._block_list):
        block.register_forward_pre_hook(lambda *_: pytest.fail("not needed"))
    routing = awakened.route(*arguments)
    assert routing.keys() == expected.keys()
    assert all(torch.equal(routing[name], value) for name, value in expected.items())


def test_a_branch_that_reads_the_backbone_gives_maps_and_routing(
    reading: PhysicsTransformer, inputs: Inputs
) -> None:
    latents = torch.randn(2, 4, 2, 4, 6)
    arguments = (latents, inputs["timestep"], text_of(inputs))
    expected, trace = reading.predict(*arguments).routing, PhysicsTrace()
    reading.predict(*arguments, PhysicsControl(trace=trace))
    assert torch.equal(trace.phenomenon_maps.flatten(1, 3), expected.phenomenon_maps)
    assert torch.equal(reading.route(*arguments).refinement_logits, expected.refinement_logits)
    plain = reading(**inputs).sample
    assert not torch.equal(controlled(reading, inputs, strength={"combustion": 4.0}), plain)
    assert torch.equal(controlled(reading, inputs, strength=dict.fromkeys(PHENOMENA, 1.0)), plain)


def test_routing_alone_of_experts_without_blocks(family: str, backbone: ModelMixin, inputs: Inputs) -> None:
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES["lora+seb+reb"])
    arguments = (torch.randn(2, 4, 2, 4, 6), inputs["timestep"], text_of(inputs))
    expected = model.predict(*arguments).routing
    assert torch.equal(model.route(*arguments).refinement_logits, expected.refinement_logits)


def test_backbone_keys_are_upstreams_and_the_rest_is_the_branch(
    backbone: ModelMixin, transformer: PhysicsTransformer
) -> None:
    own = transformer.state_dict()
    upstream = backbone.state_dict()
    assert {key for key in own if not key.startswith("physics_branch.")} == set(upstream)
    assert all(torch.equal(own[key], value) for key, value in upstream.items())


def test_physical_blocks_are_copies_of_the_listed_blocks(transformer: PhysicsTransformer) -> None:
    blocks = getattr(transformer, transformer._block_list)
    branch: Any = transformer.physics_branch
    for own, layer in zip(branch.blocks, PHYSICS["physics_layers"], strict=True):
        for name, parameter in blocks[layer].named_parameters():
            copied = own.block.get_parameter(name)
            assert torch.equal(copied, parameter) and copied.data_ptr() != parameter.data_ptr()


def test_save_and_load(awakened: PhysicsTransformer, inputs: Inputs, tmp_path: Path) -> None:
    awakened.save_pretrained(tmp_path)
    loaded = type(awakened).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).sample, awakened(**inputs).sample)
    assert loaded.config.num_layers == 3
    assert loaded.physics == awakened.physics and loaded.physics.top_k == PHYSICS["top_k"]


def test_scale_zero_is_the_backbone(
    backbone: ModelMixin, awakened: PhysicsTransformer, inputs: Inputs
) -> None:
    output = awakened(**inputs, attention_kwargs={"physics": PhysicsControl(scale=0.0)})
    assert torch.equal(output.sample, backbone(**inputs).sample) and output.routing is None
    assert not torch.equal(controlled(awakened, inputs, scale=0.5), controlled(awakened, inputs))


def test_knobs(awakened: PhysicsTransformer, inputs: Inputs) -> None:
    plain = awakened(**inputs).sample
    assert torch.equal(controlled(awakened, inputs, strength=dict.fromkeys(PHENOMENA, 1.0)), plain)
    assert not torch.equal(controlled(awakened, inputs, strength={"combustion": 4.0}), plain)
    assert not torch.equal(controlled(awakened, inputs, invert_refinement=True), plain)

    silenced = controlled(awakened, inputs, strength=dict.fromkeys(PHENOMENA, 0.0))
    without = copy.deepcopy(awakened)
    for parameter in without.physics_branch.refinement_injection.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(silenced, without(**inputs).sample)


def test_trace_holds_the_maps_on_the_token_grid(transformer: PhysicsTransformer, inputs: Inputs) -> None:
    trace = PhysicsTrace()
    controlled(transformer, inputs, trace=trace)
    maps = transformer(**inputs).routing.phenomenon_maps
    patch_t = transformer.config.get("patch_size_t") or 1
    assert trace.phenomenon_maps.shape == (2, 2 // patch_t, 2, 3, 17)
    assert torch.equal(trace.phenomenon_maps.flatten(1, 3), maps)


def test_gradient_checkpointing_gives_the_same_gradients(
    awakened: PhysicsTransformer, inputs: Inputs
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        awakened.zero_grad()
        awakened(**inputs).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in awakened.named_parameters() if p.grad is not None}

    plain, calls, blocks = gradients(), [], getattr(awakened, awakened._block_list)
    awakened.enable_gradient_checkpointing()
    for block in [*blocks, *awakened.physics_branch.blocks]:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    checkpointed = gradients()
    assert len(calls) == 2 * (len(blocks) + len(awakened.physics_branch.blocks))  # all run twice
    torch.testing.assert_close(checkpointed, plain)


def test_gradient_checkpointing_of_a_branch_that_reads_the_backbone(
    reading: PhysicsTransformer, inputs: Inputs
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        reading.zero_grad()
        reading(**inputs).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in reading.named_parameters() if p.grad is not None}

    plain, calls = gradients(), []
    reading.enable_gradient_checkpointing()
    for block in reading.physics_branch.blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 4, "both run again with the layer that they read, and not once more"


def test_one_form_of_prediction_for_all_families(awakened: PhysicsTransformer, inputs: Inputs) -> None:
    latents = torch.randn(2, 4, 2, 4, 6)
    expected = awakened(**make_inputs(awakened, latents))
    output = awakened.predict(latents, inputs["timestep"], text_of(inputs))
    sample = expected.sample if awakened._block_list == "blocks" else expected.sample.transpose(1, 2)
    assert torch.equal(output.sample, sample)
    assert torch.equal(output.routing.phenomenon_maps, expected.routing.phenomenon_maps)
    read = text_of(inputs)[awakened.semantic_text]
    assert torch.equal(output.routing.semantic_weights, awakened.physics_branch.semantic.router(read))


def test_too_many_layers_are_refused(family: str, backbone: ModelMixin) -> None:
    with pytest.raises(ProPhyError, match="3 blocks"):
        BACKBONES[family][1].from_transformer(backbone, PHYSICS | {"physics_layers": (0, 3)})


@pytest.mark.heavy
def test_blocks_compile_without_a_break(awakened: PhysicsTransformer, inputs: Inputs) -> None:
    """Regional compilation reaches the branch's blocks; "eager" traces as any other backend does."""
    torch.compiler.reset()  # what other tests compiled of the same code counts against torch's limit
    expected = awakened(**inputs).sample
    awakened.compile_repeated_blocks(fullgraph=True, backend="eager")
    branch: Any = awakened.physics_branch
    compiled = [block.block._compiled_call_impl for block in branch.blocks]
    assert all(compiled)
    torch.testing.assert_close(awakened(**inputs).sample, expected)


class Sampling:
    """A few steps of a loop that uses the model as the pipelines do: two passes in contexts of their own."""

    def __init__(self, model: PhysicsTransformer, inputs: Inputs) -> None:
        self.model, self.inputs, self.num_blocks_run = model, inputs, 0
        for block in model.physics_branch.blocks:
            block.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_blocks_run += 1

    @torch.no_grad()
    def __call__(self, trace: PhysicsTrace | None = None, num_steps: int = 6) -> torch.Tensor:
        self.num_blocks_run = 0
        control = {"physics": PhysicsControl(trace=trace)}
        latents, outputs = self.inputs["hidden_states"], []
        for step in range(num_steps):
            now = self.inputs | {"hidden_states": latents, "timestep": torch.tensor([900 - 100 * step] * 2)}
            with self.model.cache_context("cond"):
                guided = self.model(**now, attention_kwargs=control, return_dict=False)[0]
            now["encoder_hidden_states"] = -now["encoder_hidden_states"]
            with self.model.cache_context("uncond"):
                unguided = self.model(**now, attention_kwargs=control, return_dict=False)[0]
            latents = latents - 0.1 * (3 * guided - 2 * unguided)
            outputs.append(latents)
        return torch.stack(outputs)


def test_a_step_cache_that_skips_nothing_changes_nothing(
    awakened: PhysicsTransformer, inputs: Inputs
) -> None:
    sample = Sampling(awakened, inputs)
    expected = sample()
    for exact in (FirstBlockCacheConfig(threshold=0.0), TAYLORSEER(cache_interval=1)):
        awakened.enable_cache(exact)
        assert torch.equal(sample(), expected)
        assert sample.num_blocks_run == 24, "two Physical Blocks, two passes, six steps"
        awakened.disable_cache()
    assert torch.equal(sample(), expected)


@torch.no_grad()
def test_a_skipped_step_counts_each_residual_once(awakened: PhysicsTransformer, inputs: Inputs) -> None:
    """On the same input again, what the cache has kept is right."""
    awakened.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with awakened.cache_context("cond"):
        expected = awakened(**inputs, return_dict=False)[0]
        awakened.physics_branch.blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("not skipped"))
        torch.testing.assert_close(awakened(**inputs, return_dict=False)[0], expected)


def test_a_step_that_is_skipped_runs_no_physical_block_unless_a_trace_wants_it(
    awakened: PhysicsTransformer, inputs: Inputs
) -> None:
    sample = Sampling(awakened, inputs)
    expected = sample()
    # By the first block, which has a Physical Block, or by none: of six steps, one and three are whole.
    for cache, num_blocks_run in (
        (FirstBlockCacheConfig(threshold=100.0), 2 * (1 * 2 + 5 * 1)),
        (TAYLORSEER(cache_interval=3), 2 * (4 * 2)),
    ):
        awakened.enable_cache(cache)
        cached = sample()
        assert sample.num_blocks_run == num_blocks_run
        assert torch.equal(cached[0], expected[0]) and not torch.equal(cached, expected)
        awakened._reset_stateful_cache()
        trace = PhysicsTrace()
        assert torch.equal(sample(trace), cached), "a trace only watches"
        assert trace.num_passes == 6 and sample.num_blocks_run == 24
        awakened.disable_cache()


@pytest.mark.parametrize("baseline", ["lora+seb+reb", "lora+pb+seb+reb, reading the backbone"])
def test_no_maps_of_the_backbones_tokens_where_steps_are_skipped(
    family: str, backbone: ModelMixin, inputs: Inputs, baseline: str
) -> None:
    model = BACKBONES[family][1].from_transformer(backbone, PHYSICS | BASELINES[baseline])
    sample = Sampling(model, inputs)
    expected = sample()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(), expected)
    with pytest.raises(ProPhyError, match="switch the step cache off, or ask for no maps"):
        sample(PhysicsTrace())
