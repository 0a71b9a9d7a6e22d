"""Where the weights of a pipeline are, and in how many bits: by what diffusers has for little memory."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.hooks import apply_group_offloading

Offload = Literal["none", "text_encoder", "all"]


@dataclass(frozen=True)
class Placement:
    """How a pipeline is put on a device.

    Attributes:
        device: where it computes.
        offload: what waits in the host's memory until it is used: text encoders, layer by layer; with "all"
            transformers too, block by block, and their branches for the length of a step.
        storage_dtype: precision that the weights of the backbone's layers are kept in, without its norms and
            embeddings and the branch; they compute in that of the pipeline. None keeps all in that.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: Offload = "none"
    storage_dtype: torch.dtype | None = None

    @property
    def loaded_on(self) -> torch.device:
        """Where weights are read to: the device itself, unless it may be too small for them as they are."""
        is_smaller = self.offload != "none" or self.storage_dtype is not None
        return torch.device("cpu") if is_smaller else self.device

    def apply(self, pipeline: Any, dtype: torch.dtype) -> None:
        """Places the components of `pipeline`, whose transformer computes in `dtype`."""
        modules: dict[str, Any] = {
            name: component
            for name, component in pipeline.components.items()
            if isinstance(component, torch.nn.Module)
        }
        for name, component in modules.items():
            is_transformer = name.startswith("transformer")
            if is_transformer and self.storage_dtype is not None:
                component.enable_layerwise_casting(storage_dtype=self.storage_dtype, compute_dtype=dtype)
            streams = {"onload_device": self.device, "use_stream": self.device.type == "cuda"}
            if name.startswith("text_encoder") and self.offload != "none":
                apply_group_offloading(component, offload_type="leaf_level", **streams)
            elif is_transformer and self.offload == "all":
                component.enable_group_offload(num_blocks_per_group=1, **streams)
            elif self.loaded_on != self.device:
                component.to(self.device)
