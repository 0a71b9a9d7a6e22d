"""From a batch to a loss, in bare torch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.tiny.pipeline import TRANSFORMER
from prophy.training.data import SemanticBatch, TrainBatch
from prophy.training.losses import (
    Alignment,
    Reduction,
    expert_load,
    load_balancing_loss,
    semantic_alignment_loss,
    token_alignment_loss,
)
from prophy.training.module import LossOutput, ProPhyTrainModule
from prophy.training.objectives import FlowMatching
from tests.wisa import PHENOMENA

SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "ffn_dim": 192,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
}
WEIGHTS = SimpleNamespace(semantic_alignment=0.1, token_alignment=0.02, load_balancing=0.01)
TOKENS = 2 * 2 * 2


def build(
    accumulation: int = 1, reduction: Reduction = "mean", alignment: Alignment = "absolute"
) -> ProPhyTrainModule:
    torch.manual_seed(0)
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        WanTransformer3DModel(**TRANSFORMER | SMALL),
        {
            "physics_layers": [0, 1],
            "num_semantic_experts": 3,
            "num_refinement_experts": 4,
            "latent_shape": [2, 4, 4],
            "phenomena": PHENOMENA,
        },
    )
    transformer.train_backbone("frozen")
    null = {"prompt_embeds": torch.randn(5, 16)}
    return ProPhyTrainModule(
        transformer, FlowMatching(3.0), null, WEIGHTS, reduction, alignment, accumulation
    )


@pytest.fixture
def batch() -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    return TrainBatch(
        sample_ids=["a", "b", "c"],
        latents=torch.randn(3, 4, 2, 4, 4, generator=generator),
        text={"prompt_embeds": torch.randn(3, 5, 16, generator=generator)},
        drop_caption=torch.tensor([False, True, False]),
        phenomena=torch.eye(17)[:3] + torch.eye(17)[1:4],
        target_maps=torch.rand(3, TOKENS, 17, generator=generator),
        target_mask=torch.rand(3, TOKENS, 17, generator=generator) < 0.3,
        noise=torch.randn(3, 4, 2, 4, 4, generator=generator),
        timestep_quantile=torch.tensor([0.3, 0.6, 0.9]),
        given=torch.zeros(3, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("reduction", "alignment"), [("mean", "absolute"), ("sum", "absolute"), ("mean", "cross_entropy")]
)
def test_loss_is_eq_6(batch: TrainBatch, reduction: Reduction, alignment: Alignment) -> None:
    module = build(reduction=reduction, alignment=alignment)
    output = module(batch, SemanticBatch.join([batch]))

    odds = torch.distributions.Normal(0.0, 1.0).icdf(batch.timestep_quantile).exp()
    sigma = 3 * odds / (1 + 3 * odds)
    s = sigma.view(3, 1, 1, 1, 1)
    captions = batch.text["prompt_embeds"]
    text = captions.clone()
    text[1] = module.null_text.get_buffer("prompt_embeds")
    predicted = module.transformer((1 - s) * batch.latents + s * batch.noise, 1000 * sigma, text)
    diffusion = F.mse_loss(predicted.sample, batch.noise - batch.latents)
    routing = predicted.routing
    fine = token_alignment_loss(
        routing.phenomenon_maps, batch.target_maps, batch.target_mask, reduction, alignment
    )
    logits = routing.refinement_logits
    balance = load_balancing_loss(logits, expert_load(logits, 2))
    router = module.transformer.physics_branch.semantic.router
    coarse = semantic_alignment_loss(router(captions), batch.phenomena, reduction)

    torch.testing.assert_close(output.diffusion, diffusion.detach())
    torch.testing.assert_close(output.loss, diffusion + 0.1 * coarse + 0.02 * fine + 0.01 * balance)


def test_of_a_given_first_latent_the_model_sees_no_noise_and_the_loss_sees_nothing(
    batch: TrainBatch,
) -> None:
    module = build()
    module.takes_first_latent = True
    given = replace(batch, given=torch.tensor([True, False, True]))
    noisy, timesteps, text = module._inputs(given)
    plain, of_samples, _ = build()._inputs(batch)
    assert torch.equal(noisy[given.given, :, 0], batch.latents[given.given, :, 0])
    assert torch.equal(noisy[1], plain[1]) and torch.equal(noisy[:, :, 1:], plain[:, :, 1:])
    assert timesteps.shape == (3, TOKENS)
    assert torch.equal(timesteps[:, -1], of_samples) and torch.equal(timesteps[:, 0] == 0, given.given)

    output = module(given, SemanticBatch.join([given]))
    predicted = module.transformer.predict(noisy, timesteps, text).sample
    errors = (predicted - (batch.noise - batch.latents)).square()
    parts = [errors[0, :, 1:].mean(), errors[1].mean(), errors[2, :, 1:].mean()]
    torch.testing.assert_close(output.diffusion, torch.stack(parts).mean().detach())
    output.loss.backward()
    branch: Any = module.transformer.physics_branch
    assert branch.blocks[0].injection.weight.grad.any()


def test_where_nothing_is_given_timesteps_of_tokens_change_nothing_but_rounding(batch: TrainBatch) -> None:
    module = build()
    expected = module(batch)
    module.takes_first_latent = True
    torch.testing.assert_close(module(batch), expected)


def test_output_is_a_dictionary_whose_loss_alone_has_a_graph(batch: TrainBatch) -> None:
    output = build()(batch)
    assert isinstance(output, dict) and isinstance(output, LossOutput)
    assert output.semantic_alignment is None
    assert [name for name, value in output.items() if value.requires_grad] == ["loss"]
    assert 0 < output.router_entropy <= torch.tensor(4.0).log()
    assert output.expert_load.shape == (4,) and output.expert_load.sum() == pytest.approx(1.0)


def test_semantic_gradient_survives_the_averaging_over_micro_steps(batch: TrainBatch) -> None:
    """Two micro-steps whose gradients the engine averages give the gradient of the joint batch."""

    def router_gradient(module: ProPhyTrainModule, micro_steps: list[SemanticBatch | None]) -> torch.Tensor:
        for semantic in micro_steps:
            output = module(batch, semantic)
            (output.loss / len(micro_steps)).backward()
        return module.get_parameter("transformer.physics_branch.semantic.router.mlp.1.weight").grad

    semantic = SemanticBatch.join([batch])
    joint = router_gradient(build(accumulation=1), [semantic])
    assert joint.abs().sum() > 0
    # Before the first step the injections are zero: the router's gradient is the semantic alignment's alone.
    torch.testing.assert_close(router_gradient(build(accumulation=2), [None, semantic]), joint)


def one_sample(batch: TrainBatch, index: int) -> TrainBatch:
    chosen = slice(index, index + 1)
    own = {name: value[chosen] for name, value in vars(batch).items() if name != "text"}
    return TrainBatch(text={name: value[chosen] for name, value in batch.text.items()}, **own)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_do_not_depend_on_the_size_of_a_micro_batch(
    batch: TrainBatch, reduction: Reduction, precision: torch.dtype
) -> None:
    """Three micro-steps of one video, averaged as by the engine, are a step of three: each loss, and all
    gradients, though balanced experts are other ones in each video."""

    def step(accumulation: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        module = build(accumulation, reduction)
        for name, parameter in module.transformer.physics_branch.named_parameters():
            if "injection" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        batches = [batch] if accumulation == 1 else [one_sample(batch, index) for index in range(3)]
        outputs: list[LossOutput] = []
        load, later = None, batches[1:]
        for micro in batches:
            last = len(outputs) == len(batches) - 1
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                outputs.append(module(micro, SemanticBatch.join([batch]) if last else None, load, later))
                load, later = outputs[-1].expert_load, []
            (outputs[-1].loss / accumulation).backward()
        means = {
            name: torch.stack([output[name] for output in outputs]).mean(0)
            for name in ("diffusion", "token_alignment", "load_balancing", "expert_load")
        }
        return means, {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    (losses, gradients), (joint, expected) = step(3), step(1)
    rtol, atol = (1e-4, 1e-5) if precision == torch.float32 else (0.1, 0.1)
    torch.testing.assert_close(losses, joint, rtol=rtol, atol=atol)
    assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(gradients, expected, rtol=rtol, atol=atol)


def test_nothing_to_align_is_no_alignment_of_zero(batch: TrainBatch) -> None:
    """One labelled video makes no pair; without a mask there is no map to follow."""
    batch.phenomena[1:] = 0
    batch.target_mask[:] = False
    output = build()(batch, SemanticBatch.join([batch]))
    assert output.semantic_alignment.isnan() and output.token_alignment.isnan()
    assert output.loss.isfinite()
    output.loss.backward()


def test_from_the_second_step_on_everything_of_the_branch_learns(batch: TrainBatch) -> None:
    module = build()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        module(batch, SemanticBatch.join([batch])).loss.backward()
        optimizer.step()
    for name, parameter in module.transformer.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == name.startswith("physics_branch."), (
            name
        )


def test_one_batch_is_overfitted(batch: TrainBatch) -> None:
    module = build()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    first = module(batch, SemanticBatch.join([batch])).diffusion
    for _ in range(100):
        output = module(batch, SemanticBatch.join([batch]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if output.diffusion < first / 10:
            return
    pytest.fail(f"diffusion loss fell from {first:.3f} to {output.diffusion:.3f} only")
