"""The two tables of the cache, as pyarrow schemas, and the plain columns that hold a tensor.

Both tables join on `sample_id`. Small vectors are lists; a large tensor is raw bytes (C order, little endian)
beside its shape and dtype: list columns of that size read many times slower. The latents are three columns.
The text is as many tensors as the backbone's family names (`Family.text`; `prophy.settings` in a file's
footer has their names and shapes), in one column. Anything that reads Parquet reads this cache without this
project; `ROW_FILES` matches the files with rows:

    row = pyarrow.parquet.read_table(file).to_pylist()[0]
    maps = numpy.float32(row["maps"]).reshape(row["maps_shape"])
    latents = numpy.frombuffer(row["latents"], row["latents_dtype"]).reshape(row["latents_shape"])
    text = {x["name"]: numpy.frombuffer(x["data"], x["dtype"]).reshape(x["shape"]) for x in row["text"]}

    duckdb.sql("SELECT * FROM read_parquet('priors/*[0-9a-f].parquet') p JOIN "
               "read_parquet('encodings/FINGERPRINT/*[0-9a-f].parquet') e USING (sample_id)")

    datasets.load_dataset("parquet", data_files="priors/*[0-9a-f].parquet")

numpy lacks bfloat16: its values are `(numpy.frombuffer(x, "uint16").astype("uint32") << 16).view("float32")`.
The footer of each file of the priors has the names of the phenomena, in the order of labels and maps:
`json.loads(pyarrow.parquet.read_metadata(file).metadata[b"prophy.settings"])["taxonomy"]`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prophy.errors import ProPhyError
from prophy.places import Place, S3Path

if TYPE_CHECKING:  # processes that only move rows need no torch, which takes seconds to import
    import torch

SCHEMA_VERSION = 5
ROW_FILES = "*[0-9a-f].parquet"  # glob of the files that hold a table's rows: they are named by their sha256
MANIFEST = "manifest.parquet"  # in a folder of videos: a list of them, with what is known of each
INDEX = "index.parquet"  # in the folder of each table: where each sample lies
EMPTY_PROMPT = "empty_prompt.parquet"  # beside the encodings: `text` of ""
INPUT = "input.parquet"  # beside the encodings: `source` of each video of the last run's input, in its order

# Metadata of each file of a table.
VERSION_FOOTER = {b"prophy.schema_version": str(SCHEMA_VERSION).encode()}
# In it too: all that decides a row besides the video, as JSON.
SETTINGS_FOOTER = b"prophy.settings"
# In these settings of the priors: the names of the phenomena, in the order of labels and maps.
TAXONOMY = "taxonomy"

# Metadata of a column that is left out of the index.
LARGE = {b"prophy.large": b"true"}


SOURCE = pa.struct([("uri", pa.string()), ("size", pa.int64()), ("modified", pa.float64())])

# A list of these and not a map, which Hugging Face datasets cannot read.
ANSWER = pa.struct([("question", pa.string()), ("answer", pa.string())])

# One of the tensors that a text is encoded to.
TENSOR = pa.struct(
    [("name", pa.string()), ("data", pa.binary()), ("shape", pa.list_(pa.int32())), ("dtype", pa.string())]
)

# The first and the last frame that a slice of the maps covers.
SLICE = pa.struct([("start_s", pa.float64()), ("end_s", pa.float64())])

PRIORS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", SOURCE, nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # sha256 of the video file
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),  # of the source as shown, as are the three below
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("caption", pa.string()),  # given; null when the source has none
        pa.field("labels", pa.list_(pa.string())),  # phenomena as given; null when the source has none
        pa.field("vlm_caption", pa.string(), nullable=False),
        pa.field("answers", pa.list_(ANSWER), nullable=False, metadata=LARGE),  # as said
        pa.field("unparsed", pa.list_(pa.string()), nullable=False),  # said of phenomena, but no name of one
        pa.field(
            "phenomena", pa.list_(pa.float32()), nullable=False
        ),  # [num_phenomena]; as in labels, else as answered
        pa.field("map_phenomena", pa.list_(pa.int32()), nullable=False),  # K places in the taxonomy
        # Raw, of K phenomena, then of the background.
        pa.field("maps", pa.list_(pa.float32()), nullable=False, metadata=LARGE),
        pa.field("maps_shape", pa.list_(pa.int32()), nullable=False),  # [K + 1, T, H, W] on the VLM's grid
        pa.field("slice_times", pa.list_(SLICE), nullable=False),  # T; seconds after the clip's first frame
    ]
)

ENCODINGS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", SOURCE, nullable=False),
        # What `text` encodes; that also holds tensors of the first frame, where a backbone always takes one.
        pa.field("caption", pa.string(), nullable=False),
        pa.field("latents", pa.binary(), nullable=False, metadata=LARGE),
        pa.field("latents_shape", pa.list_(pa.int32()), nullable=False),
        pa.field("latents_dtype", pa.string(), nullable=False),
        pa.field("text", pa.list_(TENSOR), nullable=False, metadata=LARGE),
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("source", SOURCE, nullable=False),
        pa.field("sample_id", pa.string()),  # the clip; null where the whole video is refused
        pa.field("num_clips", pa.int32()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
    ]
)

_INPUT_FOOTER = b"prophy.input"  # the location that the videos were found at


@dataclass(frozen=True)
class CacheInput:
    """The videos that `prophy cache` was last run on.

    Attributes:
        location: its `cache.input`.
        sources: a `SOURCE` of each video, in its order; a file that could not be had has `modified` 0.
    """

    location: str
    sources: pa.Array | pa.ChunkedArray

    @property
    def uris(self) -> pa.Array | pa.ChunkedArray:
        """Names of the videos, in their order."""
        return pc.struct_field(self.sources, "uri")

    def to_table(self) -> pa.Table:
        """What `INPUT` holds; the footer too."""
        return pa.table({"source": self.sources}).replace_schema_metadata(
            {_INPUT_FOOTER: self.location.encode()}
        )

    @classmethod
    def read(cls, encodings: Place) -> "CacheInput":
        """The input that these encodings were last made for.

        Raises:
            ProPhyError: they do not say it.
        """
        if not (encodings / INPUT).is_file():
            raise ProPhyError(
                f"{encodings} does not say which videos it is for; run `prophy cache` with its configuration"
            )
        with open_file(encodings / INPUT) as file:
            rows = file.read()
        return cls(rows.schema.metadata[_INPUT_FOOTER].decode(), rows["source"])

    def places(self, sources: pa.ChunkedArray) -> pa.ChunkedArray:
        """The place of each video in the input; null where it is not there, or its file has changed."""
        place = pc.index_in(pc.struct_field(sources, "uri"), value_set=self.uris)
        size, modified = (
            pc.equal(pc.struct_field(self.sources, name).take(place), pc.struct_field(sources, name))
            for name in ("size", "modified")
        )
        return pc.if_else(pc.and_(size, modified), place, None)

    def samples(self, rows: pa.Table) -> pa.Array:
        """The samples of these videos as their files are now, each clip once; sorted.

        Of clips with the same content and span, whatever paths lead to them, the first counts.

        Args:
            rows: the rows of the priors, or of their index.
        """
        places = self.places(rows["source"])
        order = pc.sort_indices(places)[: len(places) - places.null_count]
        # Grouping by texts would take several times their memory.
        content = rows["content_hash"].dictionary_encode().combine_chunks().indices
        spans = pa.table({"content": content, "start_s": rows["start_s"], "end_s": rows["end_s"]})
        spans = spans.take(order).append_column("number", pa.array(np.arange(len(order))))
        first = spans.group_by(["content", "start_s", "end_s"]).aggregate([("number", "min")])["number_min"]
        return rows["sample_id"].take(order.take(first)).combine_chunks().sort()


def read_phenomena(priors: Place) -> tuple[str, ...]:
    """The names of a cache's phenomena, in the order of its labels and maps.

    Args:
        priors: the folder of that table, which has an index.

    Raises:
        ProPhyError: it is damaged, or another version of this program wrote it.
    """
    with open_file(priors / INDEX) as file:
        return tuple(json.loads(file.metadata.metadata[SETTINGS_FOOTER])[TAXONOMY])


class MissingFileError(ProPhyError):
    """A file of the cache that is not there, or not any more."""


class DamagedFileError(ProPhyError):
    """A file of the cache that is not what was written.

    It also comes out of a process that reads: pickle makes it anew from its arguments.

    Args:
        path: the file.
        reason: what is wrong with it, to follow its path.
    """

    def __init__(self, path: Place, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}; run `prophy cache verify`, then `prophy cache` again"


@contextmanager
def open_file(path: Place) -> Iterator[pq.ParquetFile]:
    """A file of the cache, whose pages are checked against their checksums when they are read.

    One in S3 is read at once, as a whole.

    Raises:
        MissingFileError: it is gone.
        DamagedFileError: it is damaged.
        ProPhyError: another version of this program wrote it, or the system does not let it be read.
    """
    with ExitStack() as stack:
        stack.enter_context(reading(path))
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, S3Path) else path
        file = stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
        _check_version(path, file.metadata.metadata or {})
        yield file


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Turns what may happen to a block that reads a file of the cache into one sentence.

    Raises:
        MissingFileError: it is gone.
        DamagedFileError: it is damaged.
        ProPhyError: the system does not let it be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(
            f"{path} is gone; run `prophy cache verify`, then `prophy cache` again"
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        if number := getattr(error, "errno", None):  # the system's word, not pyarrow's about the content
            raise ProPhyError(f"{path} cannot be read ({os.strerror(number)}); see to that first") from None
        raise DamagedFileError(path, "is damaged") from None


def _check_version(path: Place, footer: dict[bytes, bytes]) -> None:
    [(key, ours)] = VERSION_FOOTER.items()
    if (theirs := footer.get(key, ours)) != ours:
        raise ProPhyError(
            f"another version of this program wrote {path} (format {theirs.decode()}, not {SCHEMA_VERSION}); "
            f"choose another cache.output and run `prophy cache`, or go on with that version"
        )


def latents_columns(latents: "torch.Tensor") -> dict[str, Any]:
    """The column values that hold the latents of a clip."""
    data, shape, dtype = _raw(latents)
    return {"latents": data, "latents_shape": shape, "latents_dtype": dtype}


def latents_of(row: dict[str, Any]) -> "torch.Tensor":
    """The latents that `row` holds: the inverse of `latents_columns`."""
    return _tensor(row["latents"], row["latents_shape"], row["latents_dtype"])


def text_column(text: "Mapping[str, torch.Tensor]") -> dict[str, Any]:
    """The column value that holds what a text was encoded to, a tensor by name."""
    tensors = []
    for name, tensor in text.items():
        data, shape, dtype = _raw(tensor)
        tensors.append({"name": name, "data": data, "shape": shape, "dtype": dtype})
    return {"text": tensors}


def text_of(row: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """The tensors of the text that `row` holds, by name: the inverse of `text_column`."""
    return {each["name"]: _tensor(each["data"], each["shape"], each["dtype"]) for each in row["text"]}


def _raw(tensor: "torch.Tensor") -> tuple[bytes, list[int], str]:
    import torch

    data = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return data, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _tensor(data: bytes, shape: list[int], dtype: str) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(tuple(shape))
