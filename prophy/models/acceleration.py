"""How fast the blocks of a backbone and its branch run: the kernel of their attention, and compilation.

Both change a result by rounding alone. For any transformer, with a Physical Branch or without.
"""

from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prophy.errors import ProPhyError

# What kernels need of a GPU: compute capability.
_CAPABILITY = {
    "_native_cudnn": (8, 0),
    "_native_flash": (8, 0),
    "_flash_3": (9, 0),
    "_flash_3_hub": (9, 0),
    "sage": (8, 0),
    "sage_hub": (8, 0),
}
# What diffusers does not name.
_REPEATED = {"CogVideoXTransformer3DModel": ["CogVideoXBlock"]}
_WITHOUT_BACKWARD = ("sage", "sage_hub")
# Shapes, precisions, with and without gradients: one graph each.
_MAX_GRAPHS = 128


class CogVideoXAttnProcessor:
    """Joint attention of text and video, by the kernel that `set_attention_backend` names.

    Upstream's has only PyTorch's, and would leave another one out without a word.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, D]` and text `[B, L, D]`, each to its own shape.

        Args:
            attn: the layer.
            hidden_states: tokens.
            encoder_hidden_states: text.
            attention_mask: there is none: texts are padded with what their encoder makes of padding.
            image_rotary_emb: cosines and sines of the tokens' positions, `[N, head_dim]` each.
        """
        length = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        # [B, L + N, heads, head_dim]
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat(
                    [part[:, :length], apply_rotary_emb(part[:, length:], image_rotary_emb, sequence_dim=1)],
                    dim=1,
                )
                for part in (query, key)
            )
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        to_out, dropout = attn.to_out
        attended = dropout(to_out(attended.flatten(2, 3)))
        return attended[:, length:], attended[:, :length]


def dispatch_attention(transformer: ModelMixin) -> None:
    """Gives a family whose attention is PyTorch's alone one that another kernel, or processes, may do."""
    for module in transformer.modules():
        if isinstance(getattr(module, "processor", None), CogVideoXAttnProcessor2_0):
            module.set_processor(CogVideoXAttnProcessor())


def check_attention(
    backend: str, device: torch.device, dtype: torch.dtype, *, trains: bool, shares: bool = False
) -> None:
    """Whether attention can be computed by `backend` here; fetches a kernel that comes from the hub.

    Args:
        backend: as diffusers' `AttentionBackendName` has it.
        device: where it runs.
        dtype: precision that it computes in.
        trains: whether it needs gradients.
        shares: whether several processes share a sample.

    Raises:
        ProPhyError: its package is not installed or cannot be fetched, it does not run on this device or in
            this precision, it has no backward pass, or processes cannot share what it computes.
    """
    if reason := _why_not(backend, device, dtype, trains, shares):
        raise ProPhyError(
            f"backbone.attention {backend!r} {reason}; set it to 'native', which runs everywhere"
        )


def _why_not(
    backend: str, device: torch.device, dtype: torch.dtype, trains: bool, shares: bool
) -> str | None:
    if trains and backend in _WITHOUT_BACKWARD:
        return "has no backward pass, so that nothing can be trained with it"
    if shares and not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(backend)):
        return "cannot be shared by several GPUs, as diffusers has it"
    if backend in _CAPABILITY:
        major, minor = _CAPABILITY[backend]
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (major, minor):
            here = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
            return f"needs an NVIDIA GPU of compute capability {major}.{minor}, and this is {here}"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
        _maybe_download_kernel_for_backend(AttentionBackendName(backend))
    except Exception as error:  # of diffusers, of the hub, or of the package
        return f"cannot be loaded ({' '.join(str(error).split())})"
    return None


def set_attention(transformer: ModelMixin, backend: str) -> None:
    """Has all attention of `transformer` computed by `backend`, which `check_attention` has let pass.

    Queries and keys keep their precision. CUDA's autocast would have their norms widen them to float32: twice
    the traffic, another rounding in training than in serving, and no kernel takes them beside bfloat16.

    Raises:
        ProPhyError: the family computes its attention itself, and knows no kernels.
    """
    dispatch_attention(transformer)
    for name, module in transformer.named_modules():
        if name.endswith((".norm_q", ".norm_k")) and not module._forward_hooks:
            module.register_forward_hook(_in_the_precision_of_its_input)
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if backend != "native" and (
        deaf := [one for one in processors if not hasattr(one, "_attention_backend")]
    ):
        raise ProPhyError(
            f"backbone.attention is {backend!r}, and {type(deaf[0]).__name__} takes no kernel "
            f"but its own; set it to 'native'"
        )
    for processor in processors:
        processor._attention_backend = AttentionBackendName(backend)


def _in_the_precision_of_its_input(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.to(inputs[0].dtype)


def checkpoint_but_attention(module: nn.Module, *inputs: Any) -> Any:
    """Runs `module` and keeps its inputs alone, and what its self-attention gave: the rest is computed again.

    Attention over all tokens is half of the operations of a large model's forward pass, and its output one
    tensor of many. Attention to a text is cheap, and computed again.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keep_self_attention)
    return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_self_attention(
    context: object, operation: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = operation.name()
    if ("attention" in name or "flash_attn" in name) and args[1].numel() >= args[0].numel():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(transformer: ModelMixin, backend: str = "inductor") -> None:
    """Compiles what the model repeats, each part as one graph: blocks, Physical Blocks, experts.

    As diffusers' `compile_repeated_blocks`, but beneath what wraps a block: the state of a step cache, a
    residual that is computed while its block runs, and the shards that ZeRO 3 gathers are no part of a graph.
    The first shape gets a graph of its own; from the second on, one is made for all.

    Args:
        transformer: with a `_repeated_blocks`, or CogVideoX's.
        backend: torch.compile's; "aot_eager" generates no code.

    Raises:
        ProPhyError: it names none.
    """
    names = transformer._repeated_blocks or _REPEATED.get(type(transformer).__name__)
    if not names:
        raise ProPhyError(
            f"backbone.compile is 'regional', and {type(transformer).__name__} names no _repeated_blocks; "
            f"set it to 'none'"
        )
    for module in transformer.modules():
        if type(module).__name__ in names:
            name = "run_block" if hasattr(module, "run_block") else "forward"
            compiled = torch.compile(  # type: ignore[call-overload]  # which lacks recompile_limit
                getattr(module, name), fullgraph=True, backend=backend, recompile_limit=_MAX_GRAPHS
            )
            setattr(module, name, compiled)


def accelerate(transformer: ModelMixin, attention: str, compilation: str) -> None:
    """`set_attention`, and `compile_blocks` where `compilation` is "regional".

    Raises:
        ProPhyError: as `set_attention`.
    """
    set_attention(transformer, attention)
    if compilation == "regional":
        compile_blocks(transformer)
