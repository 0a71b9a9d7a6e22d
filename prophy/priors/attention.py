"""Keeps where a token looks in the video: an attention function beside plain SDPA, for chosen layers only.

A model uses it by `model.set_attn_implementation(ATTENTION)`; a forward pass that is given `video_attention`
adds to it. Materialising the attention of every layer (`output_attentions`) would take gigabytes.
"""

from collections.abc import Collection
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_with_video_attention"


class VideoAttention:
    """Where the one query token of each row looks in the video: the mean over chosen heads and layers.

    Args:
        layers: language layers that are averaged.
        heads: heads of these layers that are averaged; None is all.
        video: places of the `V` video tokens among the keys.
        batch_size: B.
        device: where the mean is kept.

    Attributes:
        mean: `[B, V]` float32, the attention of each row to the video tokens.
    """

    def __init__(
        self,
        layers: Collection[int],
        heads: Collection[int] | None,
        video: torch.Tensor,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.video = video
        self.mean = torch.zeros(batch_size, len(video), device=device)

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        """Adds a layer: query `[B, heads, 1, D]`, key `[B, kv_heads, L, D]`, boolean mask `[B, 1, 1, L]`."""
        grouped = query.reshape(*key.shape[:2], -1, key.shape[-1])  # [B, kv_heads, heads / kv_heads, D]
        scores = (grouped @ key.transpose(-1, -2)).float() * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        rows = scores.softmax(-1).index_select(-1, self.video.to(scores.device))
        mean = rows.mean((1, 2)) if self.heads is None else rows.flatten(1, 2)[:, list(self.heads)].mean(1)
        self.mean += mean.to(self.mean.device) / len(self.layers)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    video_attention: VideoAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; and, where a forward was given a `video_attention`, the rows that it asks for."""
    if video_attention is not None and module.layer_idx in video_attention.layers:
        video_attention.add(query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
