"""What is written beside an exported model: after how many steps, and which videos it never trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config import Config
from prophy.backbones.pretrained import download
from prophy.models.stored import local_folder

RECORD = "training.json"


@dataclass(frozen=True)
class Training:
    """How an exported model was trained.

    Attributes:
        step: steps taken.
        held_out: names of the videos that were held out; None where its checkpoint does not say.
    """

    step: int
    held_out: tuple[str, ...] | None


def write_training(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Writes it into the folder of an export, given what a checkpoint knows of its run."""
    held_out = run.get("held_out")  # the first checkpoints do not say it
    record = Training(step, None if held_out is None else tuple(held_out))
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")


def read_training(folder: Path) -> Training | None:
    """What an export says; None where it says nothing, as those of earlier versions.

    Another program's file of this name says nothing either.
    """
    try:
        said = json.loads((folder / RECORD).read_text())
        step, held_out = int(said["step"]), said["held_out"]
        return Training(step, None if held_out is None else tuple(held_out))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def never_trained_on(
    videos: Sequence[str], run: Mapping[str, Any] | None, start: Path | None
) -> list[str] | None:
    """Those of the held-out videos that no earlier step was trained on; None where that is not known.

    Args:
        videos: what the run holds out from here on.
        run: what the checkpoint that it resumes from knows of it.
        start: the export that a new run goes on from.
    """
    if run is not None:
        before = run.get("held_out")
    elif start is not None:
        trained = read_training(start)
        before = None if trained is None else trained.held_out
    else:
        before = videos
    return None if before is None else [video for video in videos if video in set(before)]


def find_training(config: Config) -> Training | None:
    """That of the checkpoint of a run, or of its backbone where that is a complete export.

    Raises:
        ProPhyError: as `local_folder` and `download`.
    """
    if config.checkpoint is not None:
        return read_training(local_folder(config.checkpoint))
    return read_training(download(config.backbone.pretrained, config.backbone.revision, [RECORD]))
