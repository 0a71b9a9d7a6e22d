"""`prophy simulate`: the sandbox's clips as files, which the rest of the product reads like any videos."""

import logging
from pathlib import Path

from pipelines.config import Config
from pipelines.runtime import open_run
from prophy import sandbox

logger = logging.getLogger(__name__)

CONTACT_SHEET_CLIPS = 16


def run(config: Config, contact_sheet: Path | None = None) -> Path:
    """Writes `config.simulate.num_clips` mp4 files and `manifest.parquet`, unless they are there already.

    Args:
        config: the run; its `simulate` section says how many clips, how long and how large.
        contact_sheet: where to write a PNG of the first clips with their masks.

    Returns:
        The path of the manifest.
    """
    open_run(config, "simulate")
    settings = config.simulate
    manifest = settings.output / "manifest.parquet"
    if manifest.exists():
        logger.info("%s is already there", manifest)
    else:
        sandbox.write_dataset(
            settings.output,
            num_clips=settings.num_clips,
            seed=settings.seed,
            num_frames=settings.num_frames,
            fps=settings.fps,
            size=settings.size,
        )
        logger.info("wrote %d clips and %s", settings.num_clips, manifest)
    if contact_sheet is not None:
        sandbox.contact_sheet(sandbox.read_truth(manifest)[:CONTACT_SHEET_CLIPS]).save(contact_sheet)
        logger.info("wrote %s", contact_sheet)
    return manifest
