"""Which device a process has, and which errors are the device's own."""

import pytest
import torch

from prophy.device import check_device, default_device, is_device_error
from prophy.errors import ProPhyError


@pytest.mark.parametrize(
    ("error", "is_its_own"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("NCCL Error 1: unhandled cuda error"), True),
        (RuntimeError("CUDA driver error: device-side assert triggered"), True),
        (RuntimeError("HIP error: invalid device function"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (ValueError("CUDA error: a prompt that says so"), False),
        (MemoryError(), False),
    ],
)
def test_errors_of_the_device(error: Exception, is_its_own: bool) -> None:
    assert is_device_error(error) == is_its_own


def test_the_cpu_is_well() -> None:
    check_device(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU can be used")
def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a driver that is too old."""
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert default_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        ProPhyError, match="CUDA_VISIBLE_DEVICES is '0', and torch .* can use no GPU; install"
    ):
        default_device()
