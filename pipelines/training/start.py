"""The trained branch that a run goes on from: whether it may. Knows no torch."""

from pathlib import Path

from pipelines.config import TrainConfig
from prophy.errors import ProPhyError
from prophy.models.description import branches_in, has_backbone
from prophy.models.stored import local_folder


def start_folder(train: TrainConfig) -> Path | None:
    """Folder of the branch to go on from, which was trained beside the transformer that this run trains.

    Raises:
        ProPhyError: there is none there; it was trained on another transformer; or the backbone was trained
            beside it, and this run takes the published one.
    """
    if train.start_from is None:
        return None
    folder = local_folder(train.start_from)
    branches = branches_in(folder)
    if train.expert not in branches:
        raise ProPhyError(
            f"the branch in {folder} was trained on {' and '.join(map(str, branches))}, and train.expert is "
            f"{train.expert}; make them equal, or set train.start_from=null for a new branch"
        )
    if has_backbone(branches[train.expert]) and train.backbone != "full":
        raise ProPhyError(
            f"the backbone was trained beside the branch in {folder}, and train.backbone is "
            f"{train.backbone!r}; set it to full, or train.start_from to another branch"
        )
    return branches[train.expert]
