"""`prophy evaluate`: models compared on the same clips, prompts and noise, by Ray Data.

The same command does what is missing, and a further contestant is all that is computed of a larger
comparison.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.caching.tables import exclusive, writing
from pipelines.config import Config
from pipelines.evaluation.contestants import Entrant, enter, notes_on_training
from pipelines.evaluation.tables import OUTPUT, SCORES, whole_file
from pipelines.evaluation.work import Denoising, Filming
from pipelines.runtime import open_run, ray_session

logger = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Compares the contestants; a second run does what is missing.

    Returns:
        The report.

    Raises:
        ProPhyError: a contestant, the clips or the list of pairs cannot be used, or the disk is full.
    """
    output, measures = config.evaluate.output, {*config.evaluate.measures}
    entrants = enter(config)
    work: list[Denoising | Filming] = []
    notes: list[str] = []
    if measures - {"videos"}:
        denoising = Denoising(config, entrants)
        notes = notes_on_training(entrants, denoising.videos)
        work.append(denoising)
    films = Filming(config, entrants) if "videos" in measures else None
    if films is not None:
        work.append(films)
    with exclusive(output, OUTPUT):
        open_run(config, "evaluate")
        with writing(output, OUTPUT):
            for folder in ("encodings", "scores", "videos"):
                (output / folder).mkdir(parents=True, exist_ok=True)
        files = [file for part in work for file in part.files]
        missing = [path for _, path in files if not path.exists()]
        logger.info("%d of %d files of scores are already there", len(files) - len(missing), len(files))
        if missing:
            with ray_session(config):
                for part in work:
                    part.run()
        scores = _collect(entrants, files)
        with whole_file(output / "scores.parquet") as partial:
            pq.write_table(scores, partial)
    # Networks and plots: of no use until here.
    from pipelines.evaluation.report import write

    names = [entrant.name for entrant in entrants]
    videos = {} if films is None else dict(zip(names, films.videos, strict=True))
    report = write(config, names, scores.to_pylist(), videos, notes)
    logger.info("all scores are in %s, and the report is %s", output / "scores.parquet", report.resolve())
    return report


def _collect(entrants: Sequence[Entrant], files: Sequence[tuple[int, Path]]) -> pa.Table:
    """All scores, with the names of the contestants."""
    tables = []
    for index, path in files:
        table = pq.read_table(path, schema=SCORES)
        names = pa.array([entrants[index].name] * len(table), pa.string())
        tables.append(table.add_column(0, "contestant", names))
    return pa.concat_tables(tables)
