"""The JSON file beside what was trained: its backbone and its settings. Reading it takes no torch."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

from prophy.errors import ProPhyError

DESCRIPTION = "physics_branch.json"
BACKBONE = "backbone{suffix}.safetensors"  # the suffix is empty where one file holds all
ExpertName = Literal["high_noise", "low_noise"]
"""Which transformer of a backbone with two: each is for a range of noise."""


def describe(folder: Path) -> dict[str, Any]:
    """`physics`, `backbone` and, where there is an adapter, `lora` of the checkpoint in `folder`.

    Raises:
        ProPhyError: the folder holds no such checkpoint, or one that names no phenomena.
    """
    if not (folder / DESCRIPTION).is_file() or not any(folder.glob("*.safetensors")):
        if any(folder.glob("rank-*.safetensors")):
            raise ProPhyError(
                f"{folder} is a training checkpoint, with a file for each worker; `prophy export` makes "
                "a branch of it: give the folder that it writes"
            )
        raise ProPhyError(
            f"no trained branch in {folder}; give the `model` folder of a finished training run, or what "
            "`prophy export` wrote"
        )
    try:
        description = dict(json.loads((folder / DESCRIPTION).read_text()))
    except (ValueError, TypeError):
        raise ProPhyError(f"{folder / DESCRIPTION} is no JSON object; export the branch anew") from None
    if not description.keys() >= {"physics", "backbone"}:
        raise ProPhyError(f"{folder / DESCRIPTION} holds no physics or no backbone; export the branch anew")
    if "phenomena" not in description["physics"]:
        raise ProPhyError(
            f"{folder / DESCRIPTION} is of an earlier version, which wrote how many phenomena the branch "
            f"knows (num_phenomena) and not which; replace that key by the list phenomena: their names, in "
            f"the order of its training"
        )
    return description


def branches_in(folder: Path) -> dict[ExpertName | None, Path]:
    """Where the branches of a checkpoint lie, by the transformer that each was trained beside.

    That is None where the backbone has one. A checkpoint for both transformers of a backbone has a folder of
    the name of each.

    Raises:
        ProPhyError: the folder holds no such checkpoint, or one of its folders does not, or two branches are
            for one transformer.
    """
    names = [name for name in get_args(ExpertName) if (folder / name).is_dir()]
    folders = [folder / name for name in names] or [folder]
    found = {trained_on(each).get("expert"): each for each in folders}
    if len(found) < len(folders):
        raise ProPhyError(
            f"both branches in {folder} were trained on {next(iter(found))}; put the one of the other "
            f"transformer into {folder / names[-1]}"
        )
    return found  # type: ignore[return-value]  # of what is in a file


def trained_on(folder: Path) -> dict[str, str | None]:
    """The backbone, as `save_branch` was given it, of the branch in `folder`.

    Raises:
        ProPhyError: the folder holds no such branch.
    """
    return describe(folder)["backbone"]


def has_backbone(folder: Path) -> bool:
    """Whether the backbone was trained too, beside the branch in `folder`, where it then lies."""
    return any(folder.glob(BACKBONE.format(suffix="*")))


def phenomena_of(folder: Path) -> list[str]:
    """What the branches of the checkpoint in `folder` tell apart, in their order.

    Raises:
        ProPhyError: the folder holds no such checkpoint, or branches with different ones.
    """
    first, *others = (describe(each)["physics"]["phenomena"] for each in branches_in(folder).values())
    if any(other != first for other in others):
        raise ProPhyError(f"the branches in {folder} have different phenomena; train both with one taxonomy")
    return first
