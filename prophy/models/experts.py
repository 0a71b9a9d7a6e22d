"""Semantic and refinement experts with their routers (ProPhy, Eq. 1 and 2).

Shape suffixes: B batch, L text tokens, D text or hidden width, N transformer tokens, T tokens of the whole
batch, E experts of the block at hand, P phenomena, K chosen experts. Routers compute in float32 whatever the
precision around them, as in Switch Transformers (Fedus et al., 2021): rounded logits choose other experts.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from torch import nn


class FP32Linear(nn.Linear):
    """A linear layer that computes in float32, under autocast too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., D]` in any precision -> `[..., E]`, float32."""
        device = input.device.type
        # Autocast knows no meta device.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class SemanticRouter(nn.Module):
    """Which physics the text speaks of: normalised weights over the semantic experts.

    The cached text carries no mask, so the tokens are pooled by attention with one learned query, which
    starts as the mean over tokens. Every expert contributes: a hard top-k collapses with small batches.
    """

    def __init__(self, text_dim: int, num_experts: int) -> None:
        super().__init__()
        self.norm = FP32LayerNorm(text_dim)
        self.query = nn.Parameter(torch.zeros(text_dim))
        self.mlp = nn.Sequential(
            FP32LayerNorm(text_dim),
            FP32Linear(text_dim, text_dim // 4),
            nn.SiLU(),
            FP32Linear(text_dim // 4, num_experts),
        )

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Text encoder output `[B, L, D]` -> rho_s `[B, E]`, float32, rows sum to 1."""
        text_BLD = self.norm(encoder_hidden_states.float())
        # Sums of products: autocast would round matrix products.
        scores_BL = (text_BLD * self.query.float()).sum(dim=-1) / math.sqrt(text_BLD.shape[-1])
        pooled_BD = (scores_BL.softmax(dim=-1)[..., None] * text_BLD).sum(dim=1)
        return self.mlp(pooled_BD).softmax(dim=-1)


class SemanticExpertBlock(nn.Module):
    """Video level: a text-weighted mixture of learned basis maps, to be added to the latent (Eq. 1).

    The maps have the latent's native shape and are resampled trilinearly for any other; at the native shape
    that is the identity. They start from N(0, 0.02), not zero: the injections start at zero already, and two
    zeros in a row would starve the router of gradient.
    """

    def __init__(
        self, text_dim: int, num_experts: int, latent_channels: int, latent_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.router = SemanticRouter(text_dim, num_experts)
        self.basis_maps = nn.Parameter(torch.randn(num_experts, latent_channels, *latent_shape) * 0.02)

    def forward(
        self, encoder_hidden_states: torch.Tensor, latent_shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes the maps. The latent itself is not asked for: the mixture is the same at every step.

        Args:
            encoder_hidden_states: text encoder output `[B, L, D]`.
            latent_shape: (T, H, W).

        Returns:
            sum_e rho_s[e] B_e `[B, C, T, H, W]`, and rho_s `[B, E]`.
        """
        weights_BE = self.router(encoder_hidden_states)
        # Resampling is linear: the mixture is resampled once instead of every map.
        mixture = torch.einsum("be,ecthw->bcthw", weights_BE.to(self.basis_maps.dtype), self.basis_maps)
        if mixture.shape[2:] != latent_shape:
            mixture = F.interpolate(mixture.float(), size=latent_shape, mode="trilinear")
        return mixture, weights_BE


class RefinementRouter(nn.Module):
    """Which physics acts at a token: logits over the refinement experts, and maps over the phenomena.

    The maps are P' of Eq. 5: a small MLP widens the E logits to the P phenomena and softens the conflict
    between alignment and routing; a sigmoid puts them on the scale of the targets, [0, 1].
    """

    def __init__(self, hidden_dim: int, num_experts: int, num_phenomena: int) -> None:
        super().__init__()
        self.norm = FP32LayerNorm(hidden_dim)
        self.gate = FP32Linear(hidden_dim, num_experts)
        self.mlp = nn.Sequential(
            FP32Linear(num_experts, 4 * num_experts), nn.SiLU(), FP32Linear(4 * num_experts, num_phenomena)
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, D]` -> logits `[B, N, E]` and phenomenon maps `[B, N, P]` in (0, 1), float32."""
        logits_BNE = self.gate(self.norm(hidden_states.float()))
        return logits_BNE, self.mlp(logits_BNE.log_softmax(dim=-1)).sigmoid()


class RefinementExpertBlock(nn.Module):
    """Token level: the `top_k` best linear experts of each token, weighted by the router (Eq. 2)."""

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, num_phenomena: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = RefinementRouter(hidden_dim, num_experts, num_phenomena)
        bound = 1 / math.sqrt(hidden_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim, hidden_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts, hidden_dim).uniform_(-bound, bound))

    def forward(
        self, hidden_states: torch.Tensor, *, invert: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Refines each token.

        Args:
            hidden_states: tokens x~ `[B, N, D]`.
            invert: routes by the negated logits (expert inversion, an experiment at inference).

        Returns:
            sum over the chosen i of rho_r[i] e_i(x~) `[B, N, D]`, where rho_r is the softmax over all experts
            and is not renormalised over the chosen ones; the router's logits `[B, N, E]` and phenomenon maps
            `[B, N, P]`, neither of them inverted.
        """
        logits_BNE, maps_BNP = self.router(hidden_states)
        weights_BNE = (-logits_BNE if invert else logits_BNE).softmax(dim=-1)
        refined = self._apply_experts(
            hidden_states.flatten(0, 1), *weights_BNE.flatten(0, 1).topk(self.top_k)
        )
        return refined.view_as(hidden_states), logits_BNE, maps_BNP

    def _apply_experts(
        self, x_TD: torch.Tensor, weights_TK: torch.Tensor, experts_TK: torch.Tensor
    ) -> torch.Tensor:
        """Runs each expert on the tokens that chose it, and on no others: `T K` products, whatever E is."""
        num_experts, device = len(self.weight), x_TD.device
        # grouped_mm, unlike nn.Linear, is not on autocast's list.
        autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x_TD.dtype

        # 1. Rows (token, choice) sorted by expert; the end of each expert's rows
        choices = experts_TK.flatten()
        order = choices.argsort(stable=True)
        experts_E = torch.arange(num_experts, device=device)
        ends_E = torch.searchsorted(choices[order], experts_E, right=True, out_int32=True)

        # 2. One product per expert, then back to the order of the tokens
        rows = x_TD.to(dtype).index_select(0, order // self.top_k)
        # Some GPUs give an expert without rows a gradient of whatever lay in memory (pytorch#172439).
        has_rows_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
        weight_EDD = self.weight.to(dtype).where(has_rows_E[:, None, None], 0)
        products = F.grouped_mm(rows, weight_EDD.mT, offs=ends_E)
        products_TKD = products.index_select(0, order.argsort()).view(*experts_TK.shape, -1)

        # 3. The weighted sum; biases are added for all experts at once, by weights that are mostly zero
        weights_TE = weights_TK.new_zeros(len(x_TD), num_experts).scatter(1, experts_TK, weights_TK)
        bias_TD = weights_TE @ self.bias.to(weights_TE.dtype)
        return ((products_TKD * weights_TK[..., None]).sum(1) + bias_TD).to(x_TD.dtype)
