"""What a check yields, and how it measures."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.gpu.models import GPU


@dataclass(frozen=True)
class Row:
    """One value of a check: `bound` says what it must be, None that it is only told."""

    name: str
    value: str
    bound: str | None = None
    passed: bool = True


def timed(function: Callable[[], object], repeats: int) -> float:
    """Mean seconds of a call after a first one, the GPU's work included."""
    if repeats > 1:
        function()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start) / repeats


def wait() -> None:
    """Until the GPU has done what it was given."""
    if GPU:
        torch.cuda.synchronize()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, as part of what is expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def within(name: str, value: float, limit: float) -> Row:
    """A row that passes below a limit."""
    return Row(name, f"{value:.1e}", f"below {limit:g}", value < limit)
