"""`prophy cache prune`: removes what is cached of videos that are in the input no more. Starts no Ray.

The input is what `prophy cache` was last run on, with each backbone that the folder has encodings for. A
video that is listed there stays, even if it could not be had.
"""

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipelines.caching.tables import (
    drop_refusals,
    drop_samples,
    exclusive,
    file_names,
    stored_table,
    update_index,
)
from pipelines.caching.verify import check_version, tables_of
from pipelines.config import Config
from pipelines.layout import CacheFolder
from prophy.errors import ProPhyError
from prophy.places import Place, sizes
from prophy.schema import CacheInput


def run(config: Config) -> dict[str, int]:
    """Prunes the cache, and prints what was removed; returns the number of rows that each folder lost.

    Killed at any moment it leaves a sound cache, and the same command goes on.

    Raises:
        ProPhyError: there is no cache, a run writes to it, another version of this program wrote it, it does
            not say its input, or a file is damaged.
    """
    folder = config.cache.folder
    if not folder.is_dir():
        raise ProPhyError(f"no cache in {folder}; set cache.output, or run `prophy cache`")
    console = Console(emoji=False)
    with exclusive(folder):
        for place, _ in tables_of(folder):
            for name in file_names(place):
                check_version(place / name)
        before = _size(folder)
        removed = prune(folder)
        freed = before - _size(folder)
    for name, count in removed.items():
        console.print(f"{name}: {count} rows removed", highlight=False, markup=False)
    console.print(f"{freed / 1e6:.1f} MB are free again", highlight=False)
    return removed


def prune(folder: Place) -> dict[str, int]:
    """Removes rows of videos in no input; a table of encodings has its own, the priors have all of them."""
    (_, priors_schema), *encodings = tables_of(folder)
    inputs = {place: CacheInput.read(place).uris for place, _ in encodings}
    listed = pa.chunked_array([chunk for uris in inputs.values() for chunk in uris.chunks], pa.string())
    removed = {}
    for place, schema in [*encodings, (CacheFolder(folder).priors, priors_schema)]:
        names = file_names(place)
        if not names:
            continue
        table = stored_table(place / names[0], schema)
        rows = update_index(table, ["sample_id", "source"])
        is_listed = pc.is_in(pc.struct_field(rows["source"], "uri"), inputs.get(place, listed))
        dropped = rows["sample_id"].filter(pc.invert(is_listed))
        drop_samples(table, dropped)
        removed[str(place).removeprefix(f"{folder}/")] = len(dropped)
    removed["quarantine"] = drop_refusals(CacheFolder(folder).quarantine, listed)
    return removed


def _size(folder: Place) -> int:
    tables = [CacheFolder(folder).quarantine, *(place for place, _ in tables_of(folder))]
    return sum(sum(sizes(place).values()) for place in tables)
