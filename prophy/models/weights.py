"""Tensors of a model's safetensors files, read one at a time, and a model built without any."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open
from torch import nn

from prophy.errors import ProPhyError

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


class WeightFiles:
    """The tensors in a folder that diffusers wrote.

    Attributes:
        files: file of each tensor.

    Raises:
        ProPhyError: there is no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / FILE).is_file():
            with safe_open(folder / FILE, "pt") as tensors:
                self.files = dict.fromkeys(tensors.keys(), FILE)
        else:
            raise ProPhyError(f"no weights ({FILE}) in {folder}; give a complete diffusers folder")

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file: what is not copied takes memory that processes share."""
        with safe_open(self._folder / self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)


def empty_model(model_class: type[ModelMixin], config: Mapping[str, Any], dtype: torch.dtype) -> ModelMixin:
    """A model whose parameters are on the meta device and whose buffers are real.

    Some parameters are float32 whatever `dtype` is: those that the class says (`_keep_in_fp32_modules`).
    """
    with no_init_weights(), init_empty_weights():
        model = model_class.from_config(config)
    kept = set(model_class._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & {*name.split(".")} else dtype)
    return model


def keep(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Leaves a parameter whole, where it is; memory of its own where it is trained."""
    parameter.data = parameter.data.to(dtype=dtype, copy=parameter.requires_grad)


def fill(
    model: nn.Module,
    read: Callable[[str], torch.Tensor | None],
    place: Callable[[nn.Parameter, torch.dtype], None],
) -> None:
    """Gives every parameter its value and its place, one after the other: no two are whole at a time.

    Args:
        model: parameters on the meta device get memory here.
        read: value of a name (parameter or saved buffer); None keeps what it has.
        place: called with each parameter when it has its value, which may be mapped from a file and in
            another precision, and with the precision that it shall have; it may shard or move it.
    """
    saved = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers():
        if name in saved and (value := read(name)) is not None:
            buffer.copy_(value)
    for name, parameter in list(model.named_parameters()):
        value = read(name)
        if parameter.is_meta:
            assert value is not None, name
            owner, _, attribute = name.rpartition(".")
            dtype, parameter = parameter.dtype, nn.Parameter(value, parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, parameter)
            place(parameter, dtype)
        else:
            if value is not None:
                parameter.data.copy_(value)
            place(parameter, parameter.dtype)
