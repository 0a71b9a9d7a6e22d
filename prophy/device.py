"""Where tensors live and in which precision a forward pass computes."""

from contextlib import AbstractContextManager, nullcontext

import torch


def default_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 natively.

    A CPU without the instructions (AVX-512 BF16, AMX, Arm BF16) emulates it, fifty times slower than float32.
    """
    if device.type != "cpu":
        return True
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager:
    """Computes in `dtype` ("bfloat16") on `device`; leaves precision alone for None, or where it is emulated.

    Where a CPU has it, small 3-D convolutions run about ten times faster in bfloat16 than in float32.
    """
    if dtype is None or not has_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
