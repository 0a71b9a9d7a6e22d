"""The diffusion loss, and what trains the routers: Eq. 3 to 5, and load balancing.

Pure functions that compute in float32.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Reduction = Literal["mean", "sum"]
Alignment = Literal["absolute", "cross_entropy"]

_NEVER = 1e-6  # a map is at least this far from 0 and 1, where its logarithm is not finite


def diffusion_loss(prediction: torch.Tensor, target: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Mean squared error of all that was noisy: over each sample's elements, then over the samples.

    Args:
        prediction: `[B, C, T, H, W]`.
        target: like `prediction`.
        given: `[B]`, bool: the first latent frame held no noise, and does not count; T is then more than 1.
    """
    frames = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 3, 4))
    counted = torch.ones_like(frames)
    counted[:, 0] = (~given).float()
    return ((frames * counted).sum(dim=1) / counted.sum(dim=1)).mean()


def semantic_alignment_loss(
    weights: torch.Tensor, labels: torch.Tensor, reduction: Reduction = "mean"
) -> torch.Tensor:
    """Relative alignment of videos (Eq. 3 and 4): sum over i < j of |cos(rho_i, rho_j) - cos(q_i, q_j)|.

    Args:
        weights: semantic routing weights rho_s `[B, E_s]`.
        labels: label vectors q_s `[B, num_phenomena]`; videos without any are left out, their cosine is
            undefined.
        reduction: "mean" over the pairs, or "sum" as in the formula. 0 where there is no pair.
    """
    labelled = labels.any(dim=1)
    weights, labels = weights[labelled].float(), labels[labelled].float()
    i, j = torch.triu_indices(len(weights), len(weights), offset=1, device=weights.device)
    difference = F.cosine_similarity(weights[i], weights[j]) - F.cosine_similarity(labels[i], labels[j])
    return difference.abs().sum() / (max(1, len(i)) if reduction == "mean" else 1)


def token_alignment_loss(
    maps: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    reduction: Reduction = "mean",
    alignment: Alignment = "absolute",
) -> torch.Tensor:
    """Alignment of tokens (Eq. 5): sum over M[n, e] = 1 of |P'[n, e] - Q[n, e]|.

    Args:
        maps: phenomenon maps P' `[B, N, num_phenomena]`.
        targets: Q_r `[B, N, num_phenomena]`.
        mask: M `[B, N, num_phenomena]`, bool. What it leaves out gets no gradient.
        reduction: "mean" over each video's masked entries, then over the videos, so that the loss of a batch
            is the mean over its micro-batches; or "sum" as in the formula, so that it is the sum. A video
            without any counts as 0.
        alignment: "absolute" as in the formula, whose optimum is a median: 0 wherever a place is uncertain;
            or the "cross_entropy" of Q to P', whose optimum is a mean.
    """
    maps, targets = maps.float(), targets.float()
    if alignment == "absolute":
        differences = (maps - targets).abs()
    else:
        inside = maps.clamp(_NEVER, 1 - _NEVER)
        differences = -(targets * inside.log() + (1 - targets) * (1 - inside).log())
    difference = torch.where(mask, differences, 0.0).sum(dim=(1, 2))
    if reduction == "sum":
        return difference.sum()
    return (difference / mask.sum(dim=(1, 2)).clamp(min=1)).mean()


def load_balancing_loss(router_logits: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """The auxiliary loss of Switch Transformers (Fedus et al., 2021, Eq. 4), for k experts per token.

    E * sum_i f_i P_i, where f_i is the share of all tokens' choices that falls on expert i (each of a token's
    k choices counts alike; no gradient) and P_i the mean of its softmax probability. Equal shares give 1,
    whatever E and k; the same k experts for every token give up to E / k.

    With f of a joint batch, the loss of that batch is the mean over its equal parts, and so is its gradient.
    With f of each part, every single video would be pushed to use all experts alike (Qiu et al., 2025,
    arXiv:2501.11873).

    Args:
        router_logits: refinement logits `[..., E]` of the batch, or of a part; all tokens count alike.
        load: f `[E]` of the whole batch, see `expert_load`.
    """
    logits = router_logits.float().flatten(0, -2)
    return logits.shape[-1] * (load * logits.softmax(dim=-1).mean(dim=0)).sum()


def expert_load(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share of all tokens' choices that falls on each expert: logits `[..., E]` -> `[E]`, summing to 1."""
    num_experts = router_logits.shape[-1]
    chosen = router_logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=num_experts) / chosen.numel()
