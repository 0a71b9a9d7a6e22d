"""The two passes of classifier-free guidance in two processes, as xDiT and SGLang have it: CFG parallelism.

Each process makes the whole video, but computes one of the two passes of every step, and gets the prediction
of the other. Knows no family: pipelines call their transformer as diffusers' do, with `return_dict=False`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, ModelHook
from torch.distributed.device_mesh import DeviceMesh

_NAME = "cfg_parallel"


@contextmanager
def one_pass_each(
    transformers: Sequence[ModelMixin], guidance: DeviceMesh | None, in_one_pass: bool
) -> Iterator[None]:
    """Has two processes share the passes of guidance while the block lasts.

    Each computes the pass of what its pipeline takes for the prompt: the first process of the group gives it
    prompt and negative prompt, and the second one gives it the two the other way round. Routing and the state
    of a step cache are those of the own pass.

    Args:
        transformers: the pipeline's.
        guidance: the two processes; None where this one computes both passes.
        in_one_pass: as `Family.guides_in_one_pass`.
    """
    if guidance is None:
        yield
        return
    # Around the hooks of a step cache, and of what waits in the host's memory.
    registries = [HookRegistry.check_if_exists_or_initialize(transformer) for transformer in transformers]
    for registry in registries:
        registry.register_hook(_OnePass(guidance.get_group(), in_one_pass), _NAME)
    try:
        yield
    finally:
        for registry in registries:
            registry.remove_hook(_NAME, recurse=False)


class _OnePass(ModelHook):
    """Around a transformer: computes the pass of this process, and gives those of both."""

    def __init__(self, group: dist.ProcessGroup, in_one_pass: bool) -> None:
        super().__init__()
        self._group, self._in_one_pass = group, in_one_pass
        self._unconditional: torch.Tensor | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """As the transformer's: predictions `[B, ...]`, or `[2 B, ...]` with the unconditional half first."""
        if self._in_one_pass:
            size = len(kwargs["hidden_states"])
            own = {
                name: value.chunk(2)[1] if isinstance(value, torch.Tensor) and len(value) == size else value
                for name, value in kwargs.items()
            }
            conditional, unconditional = self._exchange(*args, **own)
            return (torch.cat([unconditional, conditional]),)
        if self._unconditional is None:
            conditional, self._unconditional = self._exchange(*args, **kwargs)
            return (conditional,)
        # The second call of the step: it was computed during the first.
        unconditional, self._unconditional = self._unconditional, None
        return (unconditional,)

    def _exchange(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The conditional and the unconditional prediction."""
        output = self.fn_ref.original_forward(*args, **kwargs)
        assert isinstance(output, tuple), "the pipeline calls its transformer without return_dict=False"
        own = output[0].contiguous()
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own, group=self._group)
        return both
