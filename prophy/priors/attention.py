"""Keeps where answers look in the video: an attention function beside plain SDPA, for chosen layers only.

A model uses it by `model.set_attn_implementation(ATTENTION)`; a forward pass that is given `video_attention`
adds to it. Materialising the attention of every layer (`output_attentions`) would take gigabytes.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_with_video_attention"


class VideoAttention:
    """Where each query token of a row looks in the row's video: the mean over chosen heads and layers.

    Args:
        layers: language layers that are averaged.
        heads: heads of these layers that are averaged; None is all.
        videos: `[V]` of each row, places of its video's tokens among the keys.

    Attributes:
        looks: `[n, V]` float32 of each row, the attention of its `n` query tokens to its video.
    """

    def __init__(
        self, layers: Collection[int], heads: Collection[int] | None, videos: Sequence[torch.Tensor]
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.videos = videos
        self.looks = [torch.zeros((), device=video.device) for video in videos]

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float) -> None:
        """Adds a layer: query `[B, heads, n, D]`, key `[B, kv_heads, L, D]`, boolean mask `[B, 1, n, L]`."""
        # Row by row: beside a large model there is no memory for the scores of all at once.
        for row, video in enumerate(self.videos):
            grouped = query[row].unflatten(0, (len(key[row]), -1))  # [kv_heads, heads / kv_heads, n, D]
            scores = (grouped @ key[row, :, None].transpose(-1, -2)).float() * scaling
            rows = scores.masked_fill(~mask[row], -torch.inf).softmax(-1).flatten(0, 1)
            if self.heads is not None:
                rows = rows[list(self.heads)]
            mean = rows.index_select(-1, video.to(rows.device)).mean(0)
            self.looks[row] = self.looks[row] + mean.to(video.device) / len(self.layers)


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
    """SDPA; and, where a forward was given a `video_attention`, what it asks for."""
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if video_attention is not None and module.layer_idx in video_attention.layers:
        video_attention.add(query, key, attention_mask, scaling)
    # Heads that share keys are queries of the same keys: transformers would copy the keys for each, per step.
    batch_size, num_heads, num_tokens, _ = query.shape
    group = num_heads // key.shape[1]
    output = F.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], group * num_tokens, -1),
        key,
        value,
        attention_mask.repeat(1, 1, group, 1),
        scale=scaling,
    )
    return output.reshape(batch_size, num_heads, num_tokens, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
