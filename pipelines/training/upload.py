"""`prophy export` to S3: a folder on a disk of this machine first, then its files, one after the other.

Readers know a model by one file, `model_index.json` or `physics_branch.json`. That is sent last: what a
killed export leaves is no model, and the same command goes on, by sending all files anew.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipelines.config import Config
from pipelines.training.export import Export, find_export, writing_model
from pipelines.training.scratch import scratch_folder
from prophy.errors import ProPhyError
from prophy.hashing import home
from prophy.models.stored import makes_whole
from prophy.stores import asking, check_room, files_below, mendable, open_store

logger = logging.getLogger(__name__)


def run(
    config: Config,
    url: str,
    step: int | Literal["best"] | None,
    complete: bool,
    other: Path | None = None,
) -> None:
    """Writes what was trained, its moving average if there is one, to a place in S3.

    Args:
        config: the run.
        url: such as `s3://bucket/folder`; nothing may lie there but what a killed export left.
        step: see `find_export`.
        complete: see `find_export`.
        other: see `find_export`.

    Raises:
        ProPhyError: as `find_export`; or an export or other files lie there, S3 refuses or does not answer,
            or this machine has no room for it.
    """
    with mendable(f"cannot export to {url}"):
        for name in filter(makes_whole, files_below(url)):
            raise ProPhyError(f"{url}/{name} exists; choose another folder for the export")
    with find_export(config, step, complete, other) as export:
        with _staged(export) as folder, mendable(f"cannot export to {url}"):
            _send(folder, url)
        export.tell(url)


def _send(folder: Path, url: str) -> None:
    """Sends all files; each appears whole or not at all."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    for name in files_below(url):
        if name not in files:
            raise ProPhyError(f"{url}/{name} is no part of this export; choose an empty folder for it")
    num_bytes = sum(file.stat().st_size for file in files.values())
    logger.info("%d files, %.2f GB, are sent to %s", len(files), num_bytes / 1e9, url)
    store, root = open_store(url)
    for name in sorted(files, key=lambda name: (makes_whole(name), name)):
        # What another command has ended meanwhile is not written over.
        mode = "create" if makes_whole(name) else "overwrite"
        with asking("it"):
            store.put_file(str(files[name]), f"{root}/{name}", mode=mode)


@contextmanager
def _staged(export: Export) -> Iterator[Path]:
    """The export in a folder of this machine, which goes when the block ends."""
    with scratch_folder(home() / "exports" / uuid.uuid4().hex) as folder:
        check_room("before it is sent, the export", export.num_bytes, folder)
        with writing_model(folder / "model") as partial:
            export.write(partial)
        yield folder / "model"
