"""Where tensors live, in which precision a forward pass computes, and how fast it could be."""

import os
import re
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from prophy.errors import ProPhyError

# Dense bfloat16 operations per second in NVIDIA's data sheets, by a part of the device's name: the first.
_PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
}


def default_device() -> torch.device:
    """The accelerator of this process, else the CPU.

    Raises:
        ProPhyError: it was given a GPU, which torch cannot use: the CPU would take its place without a word.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if given not in ("", "-1"):
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise ProPhyError(
            f"CUDA_VISIBLE_DEVICES is {given!r}, and torch {torch.__version__}, which was built {built}, can "
            f"use no GPU; install the driver that it needs (CUDA 13: 580 or later) or a torch for the driver "
            f"there is, or set CUDA_VISIBLE_DEVICES to '' to compute on the CPU"
        )
    return torch.device("cpu")


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


def is_device_error(error: BaseException) -> bool:
    """Whether an error is the device's own, after which this process can compute nothing there.

    A kernel that failed leaves a context in which every later call fails too. cuBLAS, cuDNN and NCCL raise a
    `RuntimeError` whose text alone names them.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    library = r"\b(CUDA|CUDNN|CUBLAS|CUSOLVER|CUFFT|CUSPARSE|NCCL|HIP|MIOpen|RCCL)(?: \w+)? error\b"
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return is_plain and re.search(library, str(error), re.IGNORECASE) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, of an accelerator or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def check_device(device: torch.device) -> None:
    """Computes something small on `device`, beside all else that runs there, and waits for it.

    Raises:
        RuntimeError: the device fails, or gives something else.
    """
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):
            total = torch.ones(8, device=device).sum().item()
    else:
        total = torch.ones(8, device=device).sum().item()
    if total != 8:
        raise RuntimeError(f"{device} adds eight ones to {total}")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that `device` can do at most in `dtype`.

    Of the device's data sheet where it is known, else measured by large products with as many threads as now.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in _PEAK_BFLOAT16.items() if part in name), None)
        if known is not None:
            return known
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    torch.mm(a, b)  # buffers and kernels; not timed
    return max(_flops_of_product(a, b) for _ in range(5))


def _flops_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
