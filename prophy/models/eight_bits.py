"""Frozen weights in 8 bits beside what is trained.

diffusers' layerwise casting, with which videos are made, does not do here: it changes a weight in place for
the length of a forward pass, and the backward pass would find it in 8 bits.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prophy.models.physics_transformer import PhysicsTransformer


def stored_layers(transformer: PhysicsTransformer) -> Iterator[nn.Linear]:
    """What `keep_in` changes: frozen linear layers of blocks, but those that layerwise casting leaves too."""
    left = transformer._skip_layerwise_casting_patterns or ()
    for name, module in getattr(transformer, transformer._block_list).named_modules():
        is_frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if is_frozen and not any(re.search(pattern, name) for pattern in left):
            yield module


def keep_in(dtype: torch.dtype, transformer: PhysicsTransformer) -> None:
    """Has the weights of frozen linear layers lie in `dtype`, and compute as before: each use makes a copy.

    Biases, norms, embeddings, the branch and an adapter stay as they are.
    """
    for layer in stored_layers(transformer):
        layer.weight.data = layer.weight.data.to(dtype)
        layer.forward = partial(_Product.apply, layer.weight, layer.bias)  # type: ignore[method-assign]


class _Product(torch.autograd.Function):
    """A linear layer that keeps no copy of its weight for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        bias = None if bias is None else bias.to(dtype)
        return F.linear(hidden_states.to(dtype), weight.to(dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        (weight,) = ctx.saved_tensors
        return None, None, gradient @ weight.to(gradient.dtype)
