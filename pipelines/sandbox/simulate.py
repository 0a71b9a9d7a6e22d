"""`prophy simulate`: the sandbox's clips as files, which the rest of the product reads like any videos."""

import logging
from pathlib import Path

from pipelines.config import Config
from pipelines.pictures import check_picture, save_picture
from pipelines.runtime import open_run
from prophy import sandbox
from prophy.errors import ProPhyError
from prophy.taxonomy import load_taxonomy

logger = logging.getLogger(__name__)

CONTACT_SHEET_CLIPS = 16


def run(config: Config, contact_sheet: Path | None = None) -> Path:
    """Writes `config.simulate.num_clips` mp4 files and `manifest.parquet`, or those that are not there yet.

    Args:
        config: the run; its `simulate` section says how many clips, how long and how large.
        contact_sheet: where to write a PNG of the first clips with their masks.

    Returns:
        The path of the manifest.

    Raises:
        ProPhyError: the output holds other clips, the taxonomy lacks a phenomenon that they show, or the
            output or the picture cannot be written.
    """
    if contact_sheet is not None:
        check_picture(contact_sheet)
    sandbox.check_taxonomy(load_taxonomy(config.taxonomy).names)
    settings = config.simulate
    wanted = settings.model_dump(exclude={"output"})
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        num_held = len(sandbox.held_clips(settings.output, **wanted))
        open_run(config, "simulate")
        manifest = sandbox.write_dataset(settings.output, **wanted)
    except OSError as error:
        raise ProPhyError(
            f"cannot write to simulate.output {settings.output} ({error.strerror}); choose another"
        ) from None
    logger.info("%s: %d clips were there, %d are new", manifest, num_held, settings.num_clips - num_held)
    if contact_sheet is not None:
        clips = sandbox.read_truth(manifest)[:CONTACT_SHEET_CLIPS]
        save_picture(sandbox.contact_sheet(clips), contact_sheet)
        logger.info("wrote %s", contact_sheet)
    return manifest
