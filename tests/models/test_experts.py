"""Eq. 1 and Eq. 2 against the formulas, written out slowly."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from prophy.models.experts import RefinementExpertBlock, SemanticExpertBlock
from tests.benchmarks.experts import dense, loop


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(2, 4, 6), (3, 8, 6)], ids=["native", "resampled"])
def test_semantic_block_is_eq_1(shape: tuple[int, int, int]) -> None:
    block = SemanticExpertBlock(16, 3, 4, (2, 4, 6))
    latents, text = torch.randn(2, 4, *shape), torch.randn(2, 5, 16)

    mixture, weights = block(text, latents.shape[2:])

    expected = latents.clone()
    for video in range(2):
        for expert in range(3):
            resampled = F.interpolate(block.basis_maps[expert][None], size=shape, mode="trilinear")[0]
            expected[video] += weights[video, expert] * resampled
    torch.testing.assert_close(latents + mixture, expected)


def test_semantic_router_pools_by_attention_and_normalises() -> None:
    router = SemanticExpertBlock(16, 3, 4, (2, 4, 6)).router
    torch.nn.init.normal_(router.query)
    text = torch.randn(2, 5, 16)

    expected = []
    for tokens in text:
        normed = F.layer_norm(tokens, (16,))
        attention = torch.softmax(torch.stack([token @ router.query / 4 for token in normed]), 0)
        expected.append(
            torch.softmax(router.mlp(sum(a * t for a, t in zip(attention, normed, strict=True))), 0)
        )
    weights = router(text)
    torch.testing.assert_close(weights, torch.stack(expected))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_refinement_block_is_eq_2(top_k: int) -> None:
    block = RefinementExpertBlock(8, 4, top_k, 17)
    tokens = torch.randn(2, 6, 8)

    refined, logits, maps = block(tokens)

    expected = torch.zeros_like(tokens)
    for video in range(2):
        for token in range(6):
            x = tokens[video, token]
            rho = torch.softmax(block.router.gate(F.layer_norm(x, (8,))), 0)
            for expert in sorted(range(4), key=(-rho).tolist().__getitem__)[:top_k]:
                expected[video, token] += rho[expert] * (block.weight[expert] @ x + block.bias[expert])
    torch.testing.assert_close(refined, expected)
    torch.testing.assert_close(maps, torch.sigmoid(block.router.mlp(torch.log_softmax(logits, -1))))


@pytest.mark.parametrize("reference", [loop, dense])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (6, 2), (8, 8)])
def test_sparse_dispatch_and_its_gradients(reference: Callable, num_experts: int, top_k: int) -> None:
    block = RefinementExpertBlock(16, num_experts, top_k, 17)
    tokens = torch.randn(50, 16, requires_grad=True)
    logits = torch.randn(50, num_experts) - 9 * (torch.arange(num_experts) == 0)  # few choose the first
    weights, experts = logits.softmax(-1).topk(top_k)
    weights.requires_grad_()
    leaves = (tokens, weights, block.weight, block.bias)

    sparse, expected = block._apply_experts(tokens, weights, experts), reference(block, *leaves[:2], experts)
    torch.testing.assert_close(sparse, expected)
    direction = torch.randn_like(sparse)
    torch.testing.assert_close(
        torch.autograd.grad(sparse, leaves, direction), torch.autograd.grad(expected, leaves, direction)
    )


def test_sparse_dispatch_under_autocast_is_that_of_the_loop() -> None:
    block, tokens = RefinementExpertBlock(16, 4, 2, 17), torch.randn(50, 16)
    weights, experts = torch.randn(50, 4).softmax(-1).topk(2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            block._apply_experts(tokens, weights, experts),
            loop(block, tokens, weights, experts),
            atol=0.02,
            rtol=0.02,
        )


def test_one_expert_is_dense() -> None:
    block = RefinementExpertBlock(8, 1, 1, 17)
    tokens = torch.randn(2, 6, 8)
    torch.testing.assert_close(block(tokens)[0], F.linear(tokens, block.weight[0], block.bias[0]))


def test_all_experts_are_the_softmax_mixture() -> None:
    block = RefinementExpertBlock(8, 4, 4, 17)
    tokens = torch.randn(2, 6, 8)
    refined, logits, _ = block(tokens)
    outputs = torch.einsum("eij,bnj->bnei", block.weight, tokens) + block.bias
    torch.testing.assert_close(refined, (logits.softmax(-1)[..., None] * outputs).sum(2))


def test_only_chosen_experts_get_gradient() -> None:
    block = RefinementExpertBlock(8, 4, 2, 17)
    block.router.gate.weight.data.zero_()
    block.router.gate.bias.data.copy_(torch.tensor([0.0, 2.0, -1.0, 1.0]))
    block(torch.randn(2, 6, 8))[0].sum().backward()
    reached = [bool(gradient.any()) for gradient in block.weight.grad]
    assert reached == [False, True, False, True]
    assert [bool(gradient.any()) for gradient in block.bias.grad] == reached


def test_an_expert_without_tokens_has_no_gradient_whatever_the_kernel_leaves_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Blackwell (pytorch#172439): there the product's gradient is what lay in memory."""
    product, empty = F.grouped_mm, torch.tensor([False, False, True])[:, None, None]

    def leaves_garbage(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        weight.register_hook(lambda gradient: gradient.where(~empty, torch.nan))
        return product(rows, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", leaves_garbage)
    block = RefinementExpertBlock(8, 3, 1, 17)
    choices = torch.tensor([[0], [1], [0], [1]])
    block._apply_experts(torch.randn(4, 8), torch.ones(4, 1), choices).square().sum().backward()
    gradient = block.weight.grad
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[:2].flatten(1).any(1).all()


def test_inversion_takes_the_last_experts_and_leaves_the_maps_alone() -> None:
    block = RefinementExpertBlock(8, 4, 1, 17)
    tokens = torch.randn(1, 6, 8)
    _, logits, maps = block(tokens)
    inverted, same_logits, same_maps = block(tokens, invert=True)
    worst = logits[0].argmin(-1)
    rho = (-logits[0]).softmax(-1)
    for token, expert in enumerate(worst):
        expected = rho[token, expert] * (block.weight[expert] @ tokens[0, token] + block.bias[expert])
        torch.testing.assert_close(inverted[0, token], expected)
    assert torch.equal(logits, same_logits) and torch.equal(maps, same_maps)


def test_routing_is_computed_in_float32_under_autocast() -> None:
    """Rounded logits would choose other experts where two are close."""
    block, tokens = RefinementExpertBlock(64, 8, 2, 17), torch.randn(1, 500, 64)
    semantic, text = SemanticExpertBlock(16, 3, 4, (2, 4, 6)), torch.randn(2, 5, 16)
    torch.nn.init.normal_(semantic.router.query)
    _, logits, maps = block(tokens)
    weights = semantic.router(text)
    with torch.autocast("cpu", torch.bfloat16):
        _, same_logits, same_maps = block(tokens)
        same_weights = semantic.router(text)
    assert torch.equal(same_logits, logits) and torch.equal(same_maps, maps)
    assert torch.equal(same_weights, weights)
