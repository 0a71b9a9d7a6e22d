"""Branch-only checkpoints: the Physical Branch as safetensors, and a JSON file that names its backbone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from prophy.errors import ProPhyError

_WEIGHTS = "physics_branch.safetensors"
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


def save_branch(transformer: ModelMixin, folder: Path, backbone: dict[str, str | None]) -> None:
    """Writes the branch of `transformer` to `folder`.

    Args:
        transformer: a transformer with a Physical Branch.
        folder: created if missing.
        backbone: `name`, `revision` and `fingerprint` of its pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {
        name: value.detach().cpu().contiguous()
        for name, value in transformer.physics_branch.state_dict().items()
    }
    physics = {key: transformer.config[key] for key in _PHYSICS}
    save_file(state_dict, folder / _WEIGHTS)
    (folder / _DESCRIPTION).write_text(json.dumps({"physics": physics, "backbone": backbone}, indent=2))


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
    return BranchCheckpoint(**_describe(folder), state_dict=load_file(folder / _WEIGHTS))


def _describe(folder: Path) -> dict[str, Any]:
    if not (folder / _DESCRIPTION).is_file() or not (folder / _WEIGHTS).is_file():
        raise ProPhyError(
            f"no trained branch in {folder}; give the `model` folder of a finished training run"
        )
    return json.loads((folder / _DESCRIPTION).read_text())
