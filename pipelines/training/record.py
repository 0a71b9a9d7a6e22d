"""What is written beside an exported model: after how many steps, and which videos it never trained on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config import Config
from prophy.backbones.pretrained import resolve_pretrained
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
    """What an export says; None where it says nothing, as those of earlier versions."""
    if not (folder / RECORD).is_file():
        return None
    said = json.loads((folder / RECORD).read_text())
    held_out = said["held_out"]
    return Training(said["step"], None if held_out is None else tuple(held_out))


def find_training(config: Config) -> Training | None:
    """That of the checkpoint of a run, or of its backbone where that is a complete export.

    Raises:
        ProPhyError: as `local_folder` and `resolve_pretrained`.
    """
    if config.checkpoint is not None:
        return read_training(local_folder(config.checkpoint))
    return read_training(Path(resolve_pretrained(config.backbone.pretrained)))
