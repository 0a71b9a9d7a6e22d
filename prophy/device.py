"""Where tensors live and in which precision a forward pass computes."""

from contextlib import AbstractContextManager, nullcontext

import torch


def default_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager:
    """Computes in `dtype` ("bfloat16") on `device`, or leaves precision alone for None.

    Small 3-D convolutions run about ten times faster in bfloat16 than in float32 on a CPU.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
