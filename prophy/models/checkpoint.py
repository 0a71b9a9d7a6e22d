"""Branch-only checkpoints: the Physical Branch as safetensors, and a JSON file that names its backbone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from prophy.errors import ProPhyError

_WEIGHTS = "physics_branch{suffix}.safetensors"  # the suffix is empty where one file holds all
_MAX_FILE = 5_000_000_000  # bytes
_DESCRIPTION = "physics_branch.json"
_PHYSICS = (
    "physics_layers",
    "num_semantic_experts",
    "num_refinement_experts",
    "top_k",
    "latent_shape",
    "num_phenomena",
)


@dataclass(frozen=True)
class BranchCheckpoint:
    """What a checkpoint folder holds.

    Attributes:
        physics: the branch's part of the transformer's configuration.
        backbone: `name`, `revision` and `fingerprint` of the pipeline that it was trained on.
        state_dict: of the transformer's `physics_branch`.
    """

    physics: dict[str, Any]
    backbone: dict[str, str | None]
    state_dict: dict[str, torch.Tensor]


def physics_config(transformer: ModelMixin) -> dict[str, Any]:
    """The branch's part of the configuration of `transformer`."""
    return {key: transformer.config[key] for key in _PHYSICS}


def save_branch(transformer: ModelMixin, folder: Path, backbone: dict[str, str | None]) -> None:
    """Writes the branch of `transformer` to `folder`.

    Args:
        transformer: a transformer with a Physical Branch.
        folder: created if missing.
        backbone: `name`, `revision` and `fingerprint` of its pipeline.
    """
    state_dict = transformer.physics_branch.state_dict()
    shapes = {name: value.shape for name, value in state_dict.items()}
    write_branch(
        folder, physics_config(transformer), backbone, shapes, lambda name: state_dict[name].detach().cpu()
    )


def write_branch(
    folder: Path,
    physics: dict[str, Any],
    backbone: dict[str, str | None],
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Writes a branch that need not be in memory: one file after the other, of 5 GB at most.

    Args:
        folder: created if missing.
        physics: see `BranchCheckpoint`.
        backbone: see `BranchCheckpoint`.
        shapes: of each tensor of the branch.
        read: the tensor of a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, _WEIGHTS, shapes, read)
    (folder / _DESCRIPTION).write_text(json.dumps({"physics": physics, "backbone": backbone}, indent=2))


def write_files(
    folder: Path, pattern: str, shapes: Mapping[str, torch.Size], read: Callable[[str], torch.Tensor]
) -> dict[str, str]:
    """Writes float32 tensors, of which one file's are in memory at a time.

    Args:
        folder: where to.
        pattern: name of the files, with `{suffix}`, which is empty where one file holds all.
        shapes: of each tensor.
        read: the tensor of a name.

    Returns:
        The file of each tensor.
    """
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=_MAX_FILE)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name).contiguous() for name in names}, folder / file)
    return dict(split.tensor_to_filename)


def trained_on(folder: Path) -> dict[str, str | None]:
    """The backbone, as `save_branch` was given it, of the checkpoint in `folder`.

    Raises:
        ProPhyError: the folder holds no such checkpoint.
    """
    return _describe(folder)["backbone"]


def load_branch(folder: Path) -> BranchCheckpoint:
    """Reads what `save_branch` wrote.

    Raises:
        ProPhyError: the folder holds no such checkpoint.
    """
    state_dict: dict[str, torch.Tensor] = {}
    for file in _weights(folder):
        state_dict |= load_file(file)
    return BranchCheckpoint(**_describe(folder), state_dict=state_dict)


def _describe(folder: Path) -> dict[str, Any]:
    if not (folder / _DESCRIPTION).is_file() or not _weights(folder):
        raise ProPhyError(
            f"no trained branch in {folder}; give the `model` folder of a finished training run"
        )
    return json.loads((folder / _DESCRIPTION).read_text())


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob(_WEIGHTS.format(suffix="*")))
