"""What a training step costs: operations and activations, counted on tensors that take no memory."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prophy.models.physics_transformer import PhysicsTransformer

ShapeOf = Callable[[torch.Tensor], torch.Size]


def own_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter that lies here as a whole."""
    return parameter.shape


class _Call(nn.Module):
    """`predict` or `route` as a forward pass, for `functional_call`."""

    def __init__(self, transformer: PhysicsTransformer, method: str) -> None:
        super().__init__()
        self.transformer, self.method = transformer, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.transformer, self.method)(*inputs)


def count_flops(
    transformer: PhysicsTransformer,
    batch_size: int,
    latents: tuple[int, ...],
    text: Mapping[str, tuple[int, ...]],
    timestep: tuple[int, ...] = (),
    shape_of: ShapeOf = own_shape,
) -> int:
    """Floating-point operations of one forward and backward pass: products and convolutions, 2 per element.

    What gradient checkpointing computes again is not counted: these are the operations of the model (as in
    PaLM's model FLOPs utilisation, Chowdhery et al., 2022). What is frozen needs no gradient of its weights.

    Args:
        transformer: on any device; its parameters are not touched.
        batch_size: B.
        latents: `(C, T, H, W)`.
        text: shape of each tensor that a text is encoded to, by name.
        timestep: shape of a sample's: `(N,)` where each token has its own.
        shape_of: gives the whole shape of a parameter, of which an engine may have left a share.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flop})
    # As two plain products: a fused kernel's formula counts the scores again in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = _call("predict", transformer, batch_size, latents, text, timestep, "meta", shape_of)
        assert output.routing is not None
        outputs = (output.sample, output.routing.refinement_logits, output.routing.phenomenon_maps)
        torch.autograd.backward([value.float().sum() for value in outputs if value is not None])
    return counter.get_total_flops()


def count_forward_flops(
    transformer: PhysicsTransformer,
    batch_size: int,
    latents: tuple[int, ...],
    text: Mapping[str, tuple[int, ...]],
    timestep: tuple[int, ...] = (),
    method: Literal["predict", "route"] = "predict",
) -> int:
    """As `count_flops`, of a forward pass alone.

    That of `predict` is what gradient checkpointing computes again, that of `route` what load balancing takes
    ahead of a micro-batch.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flop})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _call(method, transformer, batch_size, latents, text, timestep, "meta")
    return counter.get_total_flops()


def count_saved_bytes(
    transformer: PhysicsTransformer,
    batch_size: int,
    latents: tuple[int, ...],
    text: Mapping[str, tuple[int, ...]],
    timestep: tuple[int, ...] = (),
) -> int:
    """Bytes in bfloat16 that a forward pass keeps for the backward pass, without gradient checkpointing.

    Attention is a fused kernel, which keeps no scores. The arguments are those of `count_flops`.
    """
    storages: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.grad_fn is not None:  # neither a parameter nor an input
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        return value

    with FakeTensorMode(), saved_tensors_hooks(pack, lambda value: value):
        output = _call("predict", transformer, batch_size, latents, text, timestep, "cpu")
        assert output.sample.requires_grad  # and so keeps the storages, whose addresses are thus unique
    return sum(storages.values())


def _call(
    method: str,
    transformer: PhysicsTransformer,
    batch_size: int,
    latents: tuple[int, ...],
    text: Mapping[str, tuple[int, ...]],
    timestep: tuple[int, ...],
    device: str,
    shape_of: ShapeOf = own_shape,
) -> Any:
    """What `predict` or `route` gives, with tensors in the place of the parameters that hold nothing."""

    def empty(value: torch.Tensor) -> torch.Tensor:
        # `grouped_mm` without memory wants bfloat16.
        return torch.empty(
            shape_of(value), device=device, dtype=torch.bfloat16, requires_grad=value.requires_grad
        )

    module, checkpointing = _Call(transformer, method), transformer.is_gradient_checkpointing
    function = transformer.physics_branch._gradient_checkpointing_func if checkpointing else None
    tensors = [*module.named_parameters(), *module.named_buffers()]
    transformer.disable_gradient_checkpointing()
    torch.compiler.set_stance("force_eager")  # what holds nothing is not worth a graph
    try:
        return torch.func.functional_call(
            module,
            {name: empty(value) for name, value in tensors},
            (
                torch.empty(batch_size, *latents, device=device, dtype=torch.bfloat16),
                torch.empty(batch_size, *timestep, device=device),
                {
                    name: torch.empty(batch_size, *shape, device=device, dtype=torch.bfloat16)
                    for name, shape in text.items()
                },
            ),
        )
    finally:
        torch.compiler.set_stance("default")
        if checkpointing:
            transformer.enable_gradient_checkpointing(function)


def _grouped_mm_flop(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Rows `[T, K]` by weights `[E, K, N]`; or, for their gradient, `[K, T]` by `[T, N]`."""
    return 2 * prod(a) * b[-1]
