"""What was trained, as safetensors, and a JSON file that names its backbone.

The Physical Branch; the adapter, if there is one, as diffusers' `load_lora_weights` reads it too; the
backbone, if that was trained.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from prophy.models.description import BACKBONE, DESCRIPTION, describe
from prophy.models.physics_transformer import BRANCH, PhysicsTransformer

_WEIGHTS = "physics_branch{suffix}.safetensors"  # the suffix is empty where one file holds all
_ADAPTER = "pytorch_lora_weights{suffix}.safetensors"
_MAX_FILE = 5_000_000_000  # bytes


@dataclass(frozen=True)
class BranchCheckpoint:
    """What a checkpoint folder holds.

    Attributes:
        physics: the transformer's argument `physics`, a `BranchConfig` as JSON.
        backbone: `name`, `revision` and `fingerprint` of the pipeline that it was trained on.
        state_dict: what was trained, by its names in the transformer with branch and adapter.
        lora: `rank` and `alpha` of the adapter; None if there is none.
    """

    physics: dict[str, Any]
    backbone: dict[str, str | None]
    state_dict: dict[str, torch.Tensor]
    lora: dict[str, Any] | None = None


def lora_config(transformer: ModelMixin) -> dict[str, Any] | None:
    """`rank` and `alpha` of the adapter of `transformer`; None if it has none."""
    if not transformer._hf_peft_config_loaded:
        return None
    adapter = transformer.peft_config["default"]
    return {"rank": adapter.r, "alpha": adapter.lora_alpha}


def save_branch(transformer: PhysicsTransformer, folder: Path, backbone: dict[str, str | None]) -> None:
    """Writes branch and adapter of `transformer` to `folder`.

    Args:
        transformer: a transformer with a Physical Branch.
        folder: created if missing.
        backbone: `name`, `revision` and `fingerprint` of its pipeline.
    """
    state_dict = {
        name: value
        for name, value in transformer.state_dict().items()
        if name.startswith(BRANCH) or "lora_" in name
    }
    write_branch(
        folder,
        transformer.config["physics"],
        backbone,
        lora_config(transformer),
        {name: value.shape for name, value in state_dict.items()},
        lambda name: state_dict[name].detach().cpu(),
    )


def write_branch(
    folder: Path,
    physics: dict[str, Any],
    backbone: dict[str, str | None],
    lora: dict[str, Any] | None,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Writes what was trained, which need not be in memory: one file after the other, of 5 GB at most.

    Args:
        folder: created if missing.
        physics: see `BranchCheckpoint`.
        backbone: see `BranchCheckpoint`.
        lora: see `BranchCheckpoint`.
        shapes: each tensor's, by its name in the transformer.
        read: the tensor of a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Each name in the file, and what it is called in the model.
    names: dict[str, dict[str, str]] = {_WEIGHTS: {}, _ADAPTER: {}, BACKBONE: {}}
    for name in shapes:
        if name.startswith(BRANCH):
            names[_WEIGHTS][name.removeprefix(BRANCH)] = name
        elif "lora_" in name:
            names[_ADAPTER]["transformer." + name.replace(".default.", ".")] = name
        else:
            names[BACKBONE][name] = name
    for pattern, own in names.items():
        if own:
            sizes = {key: shapes[name] for key, name in own.items()}
            write_files(
                folder,
                pattern,
                sizes,
                lambda key, own=own: read(own[key]),  # type: ignore[misc]
                _lora_metadata(lora) if pattern == _ADAPTER else None,
            )
    description = {"physics": physics, "backbone": backbone, **({"lora": lora} if lora else {})}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


def write_files(
    folder: Path,
    pattern: str,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """Writes float32 tensors, of which one file's are in memory at a time.

    Args:
        folder: where to.
        pattern: name of the files, with `{suffix}`, which is empty where one file holds all.
        shapes: each tensor's, by name.
        read: the tensor of a name.
        metadata: what each file says of itself.

    Returns:
        The file of each tensor.
    """
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=_MAX_FILE)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name).contiguous() for name in names}, folder / file, metadata)
    return dict(split.tensor_to_filename)


def load_branch(folder: Path) -> BranchCheckpoint:
    """Reads what `save_branch` wrote.

    Raises:
        ProPhyError: the folder holds no such checkpoint.
    """
    description = describe(folder)
    state_dict: dict[str, torch.Tensor] = {}
    for file in _files(folder, _WEIGHTS):
        state_dict |= {BRANCH + name: value for name, value in load_file(file).items()}
    for file in _files(folder, _ADAPTER):
        for name, value in load_file(file).items():
            own = name.removeprefix("transformer.").removesuffix(".weight")
            state_dict[f"{own}.default.weight"] = value
    for file in _files(folder, BACKBONE):
        state_dict |= load_file(file)
    return BranchCheckpoint(**description, state_dict=state_dict)


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern.format(suffix="*")))


def _lora_metadata(lora: dict[str, Any] | None) -> dict[str, str]:
    """What diffusers' `load_lora_weights` reads: without it, alpha would be the rank.

    One entry only: safetensors writes several in any order, and equal weights shall give equal files.
    """
    assert lora is not None
    adapter = {"r": lora["rank"], "lora_alpha": lora["alpha"]}
    adapter["target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
    packed = {f"transformer.{key}": value for key, value in adapter.items()}
    return {"lora_adapter_metadata": json.dumps(packed)}
