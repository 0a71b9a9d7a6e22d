"""Losses against their formulas, written out slowly; load balancing at the values that are known."""

import itertools
import math

import pytest
import torch

from prophy.training.losses import (
    Alignment,
    Reduction,
    diffusion_loss,
    expert_load,
    load_balancing_loss,
    semantic_alignment_loss,
    token_alignment_loss,
)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def test_diffusion_is_the_mean_squared_error_of_what_was_noisy() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 4, 3, 2, 2)
    neither = torch.zeros(2, dtype=torch.bool)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(diffusion_loss(prediction, target, neither), expected)

    of_first = torch.nn.functional.mse_loss(prediction[0, :, 1:], target[0, :, 1:])
    of_second = torch.nn.functional.mse_loss(prediction[1], target[1])
    given = torch.tensor([True, False])
    torch.testing.assert_close(diffusion_loss(prediction, target, given), (of_first + of_second) / 2)
    parts = [diffusion_loss(prediction[i : i + 1], target[i : i + 1], given[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(parts) / 2, (of_first + of_second) / 2)


def test_semantic_alignment_is_eq_3_and_4() -> None:
    torch.manual_seed(0)
    weights = torch.randn(5, 8).softmax(1).requires_grad_()
    labels = (torch.rand(5, 17) < 0.4).float()
    assert labels.any(1).all()

    expected = torch.zeros(())
    for i in range(5):
        for j in range(i + 1, 5):
            expected = expected + (cosine(weights[i], weights[j]) - cosine(labels[i], labels[j])).abs()

    total = semantic_alignment_loss(weights, labels, "sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(semantic_alignment_loss(weights, labels, "mean"), expected / 10)
    torch.testing.assert_close(
        torch.autograd.grad(total, weights)[0], torch.autograd.grad(expected, weights)[0]
    )


def test_videos_without_labels_are_left_out() -> None:
    torch.manual_seed(0)
    weights = torch.randn(4, 8).softmax(1).requires_grad_()
    labels = (torch.rand(4, 17) < 0.4).float()
    labels[1] = 0
    loss = semantic_alignment_loss(weights, labels)
    kept = [0, 2, 3]
    torch.testing.assert_close(loss, semantic_alignment_loss(weights[kept], labels[kept]))
    loss.backward()
    assert not weights.grad[1].any() and weights.grad[kept].any(1).all()


@pytest.mark.parametrize("num_videos", [0, 1])
def test_no_pair_is_no_loss(num_videos: int) -> None:
    weights = torch.rand(num_videos, 8, requires_grad=True)
    loss = semantic_alignment_loss(weights, torch.ones(num_videos, 17))
    loss.backward()
    assert loss == 0 and not weights.grad.any()


def test_token_alignment_is_eq_5() -> None:
    torch.manual_seed(0)
    maps, targets, mask = torch.rand(2, 6, 17), torch.rand(2, 6, 17), torch.rand(2, 6, 17) < 0.2
    per_video: list[list[float]] = []
    for video in range(2):
        per_video.append([])
        for n in range(6):
            for e in range(17):
                if mask[video, n, e]:
                    per_video[-1].append(abs(maps[video, n, e].item() - targets[video, n, e].item()))
    total = token_alignment_loss(maps, targets, mask, "sum").item()
    mean = token_alignment_loss(maps, targets, mask, "mean").item()
    assert math.isclose(total, sum(itertools.chain(*per_video)), rel_tol=1e-5)
    assert math.isclose(mean, sum(sum(d) / len(d) for d in per_video) / 2, rel_tol=1e-5)


def test_cross_entropy_is_that_of_torch_and_its_optimum_a_mean() -> None:
    torch.manual_seed(0)
    maps, targets, mask = torch.rand(2, 6, 17), torch.rand(2, 6, 17), torch.rand(2, 6, 17) < 0.2
    expected = torch.nn.functional.binary_cross_entropy(maps[mask], targets[mask], reduction="sum")
    torch.testing.assert_close(token_alignment_loss(maps, targets, mask, "sum", "cross_entropy"), expected)

    one_in_four, everywhere = (
        torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1),
        torch.ones(1, 4, 1, dtype=torch.bool),
    )
    grid = torch.linspace(0, 1, 101)  # its ends are where a logarithm is not finite
    optima: dict[Alignment, float] = {"absolute": 0.0, "cross_entropy": 0.25}
    for alignment, best in optima.items():
        losses = [
            token_alignment_loss(value.expand(1, 4, 1), one_in_four, everywhere, "mean", alignment)
            for value in grid
        ]
        assert torch.stack(losses).isfinite().all()
        assert grid[torch.stack(losses).argmin()].item() == pytest.approx(best)


@pytest.mark.parametrize("alignment", ["absolute", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_entries_get_no_gradient(reduction: Reduction, alignment: Alignment) -> None:
    torch.manual_seed(0)
    maps, mask = torch.rand(2, 6, 17, requires_grad=True), torch.rand(2, 6, 17) < 0.2
    token_alignment_loss(maps, torch.rand(2, 6, 17), mask, reduction, alignment).backward()
    assert torch.equal(maps.grad != 0, mask)


def test_token_alignment_of_a_batch_is_the_mean_of_its_micro_batches() -> None:
    torch.manual_seed(0)
    maps, targets, mask = torch.rand(4, 6, 17), torch.rand(4, 6, 17), torch.rand(4, 6, 17) < 0.2
    mask[0] = False
    micro = [token_alignment_loss(maps[i : i + 2], targets[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(token_alignment_loss(maps, targets, mask), sum(micro) / 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_at_known_routings(top_k: int) -> None:
    balanced = 10 * torch.eye(4).repeat(3, 1)
    balanced += 5 * torch.eye(4).roll(1, 0).repeat(3, 1)
    torch.testing.assert_close(load_balancing_loss(balanced, expert_load(balanced, top_k)), torch.tensor(1.0))
    torch.testing.assert_close(expert_load(balanced, top_k), torch.full((4,), 0.25))

    collapsed = torch.full((12, 4), -30.0)
    collapsed[:, :top_k] = 30.0
    torch.testing.assert_close(
        load_balancing_loss(collapsed, expert_load(collapsed, top_k)), torch.tensor(4.0 / top_k)
    )


def test_load_balancing_is_the_formula_and_its_gradient_evens_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 4)
    logits[..., 1] += 1.0
    logits.requires_grad_()
    loss = load_balancing_loss(logits, expert_load(logits, 2))

    counts, probability = [0] * 4, [0.0] * 4
    for token in logits.detach().flatten(0, 1):
        for expert in token.argsort(descending=True)[:2]:
            counts[expert] += 1
        for expert in range(4):
            probability[expert] += (token[expert].exp() / token.exp().sum()).item()
    expected = 4 * sum(c / 200 * p / 100 for c, p in zip(counts, probability, strict=True))
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    loss.backward()
    assert logits.grad[..., 1].mean() > 0  # descent lowers the overloaded expert
