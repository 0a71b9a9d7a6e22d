"""The samples in a cache: which there are, and how one is read. Opening a cache takes no torch."""

import logging
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from prophy.errors import ProPhyError
from prophy.places import Place as Folder
from prophy.places import folders
from prophy.schema import (
    EMPTY_PROMPT,
    INDEX,
    CacheInput,
    DamagedFileError,
    MissingFileError,
    latents_of,
    open_file,
    read_phenomena,
    text_of,
)
from prophy.staging import drop_copy, on_disk, tell_staging

if TYPE_CHECKING:  # the driver of training reads no tensors, and torch takes seconds to import
    import torch

logger = logging.getLogger(__name__)

Place = tuple[str, int]
"""The file and the row group that a row lies in."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class PriorSample:
    """One clip of the cache.

    Attributes:
        latents: `[C, T, H, W]`.
        text: the caption, encoded: the family's tensors, by name; and those of the first frame, where the
            backbone always takes an image.
        phenomena: `[num_phenomena]`, label vector.
        maps: raw, `[K + 1, T, H, W]` on the VLM's grid, the background's last.
        map_phenomena: places in the taxonomy of the first K maps.
        slices: `[T, 2]`, which part of the clip each slice of the maps covers (`make_targets`).
    """

    latents: "torch.Tensor"
    text: "dict[str, torch.Tensor]"
    phenomena: "torch.Tensor"
    maps: "torch.Tensor"
    map_phenomena: list[int]
    slices: "torch.Tensor"


class PriorCache:
    """The samples of the current input, the last that `prophy cache` was run on, read one at a time.

    They are in both tables of the cache; a clip that several paths lead to is one sample.

    Attributes:
        phenomena: names, in the order of labels and maps.
        sample_ids: names, in order.
        shapes: those of the latents, `(C, T, H, W)`.
        location: `cache.input` of the last `prophy cache` with these encodings.
        num_videos: videos that the samples are of.
        num_left_out: videos that are cached, but not in the current input.

    Args:
        priors: folder of that table.
        encodings: folder of the encodings that belong to the backbone.
        max_staged_bytes: what copies of files in S3 may take on a machine that reads samples
            (`cache.max_staged_bytes`); files on a disk are read where they lie.

    Raises:
        ProPhyError: a table is missing, or none of the current input is in both.
    """

    def __init__(self, priors: Folder, encodings: Folder, max_staged_bytes: int = 0) -> None:
        self._priors, self._encodings, self._max_staged_bytes = priors, encodings, max_staged_bytes
        prior_rows = _read_index(priors, ["source", "content_hash", "start_s", "end_s"])
        if not (encodings / INDEX).is_file() and any(
            (folder / INDEX).is_file() for folder in folders(encodings.parent)
        ):
            raise ProPhyError(
                f"the encodings in {encodings.parent} were made for another backbone or other clips; "
                f"run `prophy cache` with this configuration"
            )
        encoding_rows = _read_index(encodings, ["latents_shape"])
        self.phenomena = read_phenomena(priors)
        current = CacheInput.read(encodings)
        is_encoded = pc.is_in(prior_rows["sample_id"], encoding_rows["sample_id"])
        common = prior_rows.drop_columns(["file", "row_group"]).filter(is_encoded)
        self.sample_ids = current.samples(common)
        if not len(self.sample_ids):
            raise ProPhyError(
                f"no video of {current.location} is in both {priors} and {encodings}; "
                f"run `prophy cache` with this configuration"
            )
        self.location = current.location
        uris = pc.struct_field(common["source"], "uri")
        self.num_videos = len(uris.filter(pc.is_in(common["sample_id"], self.sample_ids)).unique())
        self.num_left_out = len(uris.filter(pc.invert(pc.is_in(uris, current.uris))).unique())
        self._places = [_places(self.sample_ids, rows) for rows in (prior_rows, encoding_rows)]
        sizes = encoding_rows["latents_shape"].take(_find(self.sample_ids, encoding_rows)).combine_chunks()
        sizes = pc.binary_join(sizes.cast(pa.list_(pa.string())), " ").dictionary_encode()
        self.shapes = [tuple(map(int, text.split())) for text in sizes.dictionary.to_pylist()]
        self._shape_of = sizes.indices

    def by_shape(self, sample_ids: pa.Array) -> dict[Shape, pa.Array]:
        """Those of the samples that have each shape of latents, in order."""
        wanted = pc.is_in(self.sample_ids, sample_ids)
        groups = {
            shape: self.sample_ids.filter(pc.and_(wanted, pc.equal(self._shape_of, number)))
            for number, shape in enumerate(self.shapes)
        }
        return {shape: ids for shape, ids in groups.items() if len(ids)}

    def version(self, sample_id: str) -> str:
        """Which files and rows hold a sample: another where it was cached anew, for files never change."""
        return repr(self._place(sample_id))

    def captions(self) -> pa.ChunkedArray:
        """What each sample's text was encoded from."""
        rows = _read_index(self._encodings, ["caption"])
        return rows["caption"].take(_find(self.sample_ids, rows))

    def tell_staging(self) -> None:
        """Says how much of S3 reading all samples copies to a disk; nothing of a cache on a disk."""
        tables = zip((self._priors, self._encodings), self._places, strict=True)
        files = {table: places["file"].unique().to_pylist() for table, places in tables}
        tell_staging(files, self._max_staged_bytes)

    def null_text(self) -> "dict[str, torch.Tensor]":
        """The empty prompt, encoded: the family's tensors, by name."""
        with open_file(self._encodings / EMPTY_PROMPT) as file:
            [row] = file.read().to_pylist()
        return text_of(row)

    def read(self, sample_id: str) -> PriorSample:
        """One sample; `prophy cache` and its `prune` may have written it into another file since.

        Raises:
            ProPhyError: they took it out, or its file is damaged or gone.
        """
        try:
            return self._read(sample_id)
        except MissingFileError:
            # The indices were written before files went.
            rows = _read_index(self._priors, []), _read_index(self._encodings, [])
            self._places = [_places(self.sample_ids, each) for each in rows]
            return self._read(sample_id)

    def _place(self, sample_id: str) -> tuple[Place, Place]:
        """Where its row of the priors lies, and that of the encodings."""
        row = bisect_left(self.sample_ids, sample_id, key=pa.StringScalar.as_py)
        if row == len(self.sample_ids) or self.sample_ids[row].as_py() != sample_id:
            raise KeyError(sample_id)
        prior, encoding = (tuple(column[row].as_py() for column in table) for table in self._places)
        if None in (*prior, *encoding):
            raise ProPhyError(
                f"the sample {sample_id} was taken out of the cache ({self._priors.parent}) after this run "
                f"began, by `prophy cache` or its `prune`; run the same command again to go on without it"
            )
        return prior, encoding

    def _read(self, sample_id: str) -> PriorSample:
        import torch

        prior, encoding = self._place(sample_id)
        columns = ["phenomena", "map_phenomena", "maps", "maps_shape", "slice_times", "start_s", "end_s"]
        labels = self._read_row(self._priors, prior, columns)
        names = ["latents", "latents_shape", "latents_dtype", "text"]
        [encoded] = self._read_row(self._encodings, encoding, names).to_pylist()
        maps = labels["maps"].combine_chunks().values.to_numpy(zero_copy_only=False).copy()
        times = [[each["start_s"], each["end_s"]] for each in labels["slice_times"][0].as_py()]
        duration_s = labels["end_s"][0].as_py() - labels["start_s"][0].as_py()
        return PriorSample(
            latents=latents_of(encoded),
            text=text_of(encoded),
            phenomena=torch.tensor(labels["phenomena"][0].as_py()),
            maps=torch.from_numpy(maps).reshape(labels["maps_shape"][0].as_py()),
            map_phenomena=labels["map_phenomena"][0].as_py(),
            slices=torch.tensor(times, dtype=torch.float64) / duration_s,
        )

    def _read_row(self, table: Folder, place: Place, columns: list[str]) -> pa.Table:
        file = table / place[0]
        try:
            return self._read_row_group(file, place[1], columns)
        except DamagedFileError as damage:
            if isinstance(file, Path) or damage.path == file:  # not this machine's copy
                raise
            logger.warning("%s %s, and is copied from S3 anew", damage.path, damage.reason)
            drop_copy(file)
            return self._read_row_group(file, place[1], columns)

    def _read_row_group(self, file: Folder, number: int, columns: list[str]) -> pa.Table:
        with on_disk(file, self._max_staged_bytes) as path, open_file(path) as opened:
            return opened.read_row_group(number, columns=columns, use_threads=False)


def _read_index(table: Folder, columns: list[str]) -> pa.Table:
    """Where the row of each sample lies: `file` and `row_group`; and `columns` of it.

    Every worker gets what is left of it: the samples of a file share its name.
    """
    if not (table / INDEX).is_file():
        raise ProPhyError(f"no cache in {table}; run `prophy cache` with this configuration first")
    with open_file(table / INDEX) as file:
        rows = file.read(["sample_id", "file", "row_group", *columns])
    return rows.set_column(rows.column_names.index("file"), "file", rows["file"].dictionary_encode())


def _find(sample_ids: pa.Array, rows: pa.Table) -> pa.Array:
    """The place of each sample among the rows, null where it is none of them."""
    return pc.index_in(sample_ids, value_set=rows["sample_id"])


def _places(sample_ids: pa.Array, rows: pa.Table) -> pa.Table:
    return rows.select(["file", "row_group"]).take(_find(sample_ids, rows)).combine_chunks()
