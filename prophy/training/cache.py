"""The samples in a cache: which there are, and how one is read. Opening a cache takes no torch."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prophy.errors import ProPhyError
from prophy.schema import (
    EMPTY_PROMPT,
    INDEX,
    CacheInput,
    MissingFileError,
    latents_of,
    open_file,
    read_phenomena,
    text_of,
)

if TYPE_CHECKING:  # the driver of training reads no tensors, and torch takes seconds to import
    import torch

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
        location: `cache.input` of the last `prophy cache` with these encodings.
        num_videos: videos that the samples are of.
        num_left_out: videos that are cached, but not in the current input.

    Args:
        priors: folder of that table.
        encodings: folder of the encodings that belong to the backbone.

    Raises:
        ProPhyError: a table is missing, or none of the current input is in both.
    """

    def __init__(self, priors: Path, encodings: Path) -> None:
        self._priors, self._encodings = priors, encodings
        prior_rows = _read_index(priors, ["source", "content_hash", "start_s", "end_s"])
        if not (encodings / INDEX).is_file() and any(encodings.parent.glob(f"*/{INDEX}")):
            raise ProPhyError(
                f"the encodings in {encodings.parent} were made for another backbone or other clips; "
                f"run `prophy cache` with this configuration"
            )
        encoding_rows = _read_index(encodings, ["latents_shape"])
        self.phenomena = read_phenomena(priors)
        current = CacheInput.read(encodings)
        common = [row for key, row in prior_rows.items() if key in encoding_rows]
        samples = current.samples(common)
        if not samples:
            raise ProPhyError(
                f"no video of {current.location} is in both {priors} and {encodings}; "
                f"run `prophy cache` with this configuration"
            )
        self.location = current.location
        self.num_videos = len({prior_rows[key]["source"]["uri"] for key in samples})
        self.num_left_out = len({row["source"]["uri"] for row in common} - current.uris)
        self._rows = _rows(samples, prior_rows, encoding_rows)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of the latents, `(C, T, H, W)`, of each sample id."""
        return {key: shape for key, (_, _, shape) in self._rows.items()}

    def version(self, sample_id: str) -> str:
        """Which files and rows hold a sample: another where it was cached anew, for files never change."""
        prior, encoding, _ = self._rows[sample_id]
        return repr((prior, encoding))

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
            self._find_again(sample_id)
            return self._read(sample_id)

    def _find_again(self, sample_id: str) -> None:
        """Looks up anew where each sample is; the indices were written before files went."""
        priors, encodings = _read_index(self._priors, []), _read_index(self._encodings, ["latents_shape"])
        if sample_id not in priors or sample_id not in encodings:
            raise ProPhyError(
                f"the sample {sample_id} was taken out of the cache ({self._priors.parent}) after this run "
                f"began, by `prophy cache` or its `prune`; run the same command again to go on without it"
            )
        self._rows |= _rows(self._rows.keys() & priors.keys() & encodings.keys(), priors, encodings)

    def _read(self, sample_id: str) -> PriorSample:
        import torch

        prior, encoding, _ = self._rows[sample_id]
        columns = ["phenomena", "map_phenomena", "maps", "maps_shape", "slice_times", "start_s", "end_s"]
        labels = _read_row(self._priors, prior, columns)
        names = ["latents", "latents_shape", "latents_dtype", "text"]
        [encoded] = _read_row(self._encodings, encoding, names).to_pylist()
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


def _read_index(table: Path, columns: list[str]) -> dict[str, dict[str, Any]]:
    """Where the row of each sample lies: `file` and `row_group`; and `columns` of it."""
    if not (table / INDEX).is_file():
        raise ProPhyError(f"no cache in {table}; run `prophy cache` with this configuration first")
    with open_file(table / INDEX) as file:
        rows = file.read(["sample_id", "file", "row_group", *columns]).to_pylist()
    return {row["sample_id"]: row for row in rows}


def _rows(
    sample_ids: Iterable[str], priors: dict[str, dict[str, Any]], encodings: dict[str, dict[str, Any]]
) -> dict[str, tuple[Place, Place, Shape]]:
    """Where both rows of each sample lie, and its shape.

    Every worker gets a copy: the samples of a file share its name, and all of one shape share that.
    """
    shapes: dict[Shape, Shape] = {}
    rows = {}
    for key in sample_ids:
        shape = tuple(encodings[key]["latents_shape"])
        rows[key] = (_place(priors[key]), _place(encodings[key]), shapes.setdefault(shape, shape))
    return rows


def _place(row: dict[str, Any]) -> Place:
    return sys.intern(row["file"]), row["row_group"]


def _read_row(table: Path, place: Place, columns: list[str]) -> pa.Table:
    file_name, row_group = place
    with open_file(table / file_name) as file:
        return file.read_row_group(row_group, columns=columns, use_threads=False)
