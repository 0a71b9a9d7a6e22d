"""The JSON file beside what was trained: its backbone and its settings. Reading it takes no torch."""

import json
from pathlib import Path
from typing import Any

from prophy.errors import ProPhyError

DESCRIPTION = "physics_branch.json"


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


def trained_on(folder: Path) -> dict[str, str | None]:
    """The backbone, as `save_branch` was given it, of the checkpoint in `folder`.

    Raises:
        ProPhyError: the folder holds no such checkpoint.
    """
    return describe(folder)["backbone"]
