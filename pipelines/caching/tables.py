"""The cache's files: written whole or not at all, named by their content, indexed, checked when read.

A table is a folder of Parquet files with one row per row group, so that training reads one sample at a time.
It lies on a disk or in S3 (`prophy.places`); what a killed run leaves half written is ignored.
The footer of each file says which schema, models and settings made it. `index.parquet` is derived from the
files and may be deleted. Does not know Ray, the models, or how a row is made.
"""

import hashlib
import json
import platform
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.caching.parts import ReadParts, read_here
from pipelines.caching.seal import PLACE, sealed
from prophy.errors import ProPhyError
from prophy.leases import held
from prophy.places import Place, clear_temporaries, names, remove_all, write_whole
from prophy.schema import (
    INDEX,
    LARGE,
    QUARANTINE,
    SETTINGS_FOOTER,
    VERSION_FOOTER,
    DamagedFileError,
    open_file,
)

ATTEMPTS_FOLDER = ".attempts"  # what is being worked on, for the stages that hold a model
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}\.parquet")


@dataclass(frozen=True)
class Table:
    """One table of the cache: where it lies, what a row is, and what made it.

    Attributes:
        folder: holds the files.
        schema: a row's.
        settings: everything that decides the content of a row, besides the video, as JSON values.
        provenance: what else a reader wants to know: names and versions. Two runs may differ in it.
    """

    folder: Place
    schema: pa.Schema
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def footer(self) -> dict[bytes, bytes]:
        """The key-value metadata of each file."""
        return VERSION_FOOTER | {
            b"prophy.fingerprint": fingerprint_of(self.settings).encode(),
            SETTINGS_FOOTER: json.dumps(self.settings, sort_keys=True).encode(),
            b"prophy.provenance": json.dumps(self.provenance, sort_keys=True).encode(),
        }


def fingerprint_of(settings: dict[str, Any]) -> str:
    """Short name of a JSON tree; changes whenever anything in it changes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def exclusive(folder: Place, setting: str = "cache.output") -> Iterator[None]:
    """Holds a folder for one writer and clears away what a killed one left half written.

    Args:
        folder: the cache's, or another's.
        setting: the key of the configuration that names it.

    Raises:
        ProPhyError: another run writes to it, or it cannot be written to.
    """
    with ExitStack() as stack:
        with writing(folder, setting):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder, setting))
            clear_temporaries(folder)
        remove_all(folder / ATTEMPTS_FOLDER)
        yield


@contextmanager
def writing(folder: Place, setting: str = "cache.output") -> Iterator[None]:
    """Turns what a full disk, or a folder that is not there or not ours, does to a block into one sentence.

    The arguments are those of `exclusive`.
    """
    try:
        yield
    except FileNotFoundError:
        raise ProPhyError(
            f"node {platform.node()} does not see {folder}; mount there what {setting} names, then run the "
            f"same command again: what was written before is whole"
        ) from None
    except OSError as error:
        raise ProPhyError(
            f"cannot write to {folder} ({error.strerror}); free it or choose another {setting}, then run the "
            f"same command again: what was written before is whole"
        ) from None


def write_file(
    folder: Place,
    rows: pa.Table,
    footer: dict[bytes, bytes],
    *,
    name: str = "",
    row_group_size: int | None = None,
) -> Place:
    """Writes one Parquet file that appears whole or not at all; one that is there with these bytes stays.

    Args:
        folder: where it goes. None is made: a node that does not see the cache would make one of its own.
        rows: its content.
        footer: key-value metadata.
        name: the file's; if empty, the sha256 of its bytes. A file with a name holds that inside itself,
            but for the index, which is made anew at will.
        row_group_size: rows per row group.

    Raises:
        ProPhyError: the disk is full, or the folder is not there or cannot be written to.
    """
    is_sealed = name not in ("", INDEX)
    buffer = pa.BufferOutputStream()
    pq.write_table(
        rows.replace_schema_metadata(footer | PLACE if is_sealed else footer),
        buffer,
        row_group_size=row_group_size,
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = buffer.getvalue().to_pybytes()
    if is_sealed:
        content = sealed(content)
    path = folder / (name or f"{hashlib.sha256(content).hexdigest()}.parquet")
    with writing(folder):
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)
    return path


@dataclass(frozen=True)
class WriteRows:
    """The last stage: good rows into one file of `table`, failed ones into one file of `quarantine`."""

    table: Table
    quarantine: Table

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Takes the table's columns and `error`.

        Returns:
            Rows `written` and `failed`, their `share`, and the names of the `files` that hold them.
        """
        rows = batch.filter(pc.is_null(batch["error"]))
        good = rows.select(self.table.schema.names).cast(self.table.schema)  # a null where none may be raises
        errors = batch["error"].drop_null().to_pylist()
        files = list[Place]()
        if good.num_rows:
            files.append(write_file(self.table.folder, good, self.table.footer, row_group_size=1))
        if errors:
            rows = pa.Table.from_pylist(errors, self.quarantine.schema)
            files.append(write_file(self.quarantine.folder, rows, self.quarantine.footer))
        counts = {"written": good.num_rows, "failed": len(errors), "share": pc.sum(batch["share"]).as_py()}
        return pa.Table.from_pylist([counts | {"files": [file.name for file in files]}])


def check_written(files: Collection[str], folders: Sequence[Place]) -> None:
    """Whether files that nodes wrote are here.

    Args:
        files: their names.
        folders: the tables'.

    Raises:
        ProPhyError: some are not: a node has something else where the cache is.
    """
    unlisted = set(files).difference(*map(names, folders))
    # A shared disk may list a file late that it opens at once.
    lost = [name for name in unlisted if not any((folder / name).exists() for folder in folders)]
    if lost:
        raise ProPhyError(
            f"{len(lost)} of {len(files)} files that nodes wrote are not in {folders[0].parent}: a node sees "
            f"another folder there; mount cache.output on all of them (`prophy doctor` says where it is "
            f"missing), then run the same command again"
        )


def read_quarantine(folder: Place, settings: dict[str, Any] | None = None) -> pa.Table:
    """What could not be used so far.

    Args:
        folder: the quarantine's.
        settings: those with which it could not; None is any.

    Raises:
        ProPhyError: a file is damaged.
    """
    parts = [QUARANTINE.empty_table()]
    for name in file_names(folder):
        with open_file(folder / name) as file:
            made = (file.metadata.metadata or {}).get(b"prophy.fingerprint")
            if settings is None or made == fingerprint_of(settings).encode():
                parts.append(file.read())
    return pa.concat_tables(parts)


def drop_refusals(folder: Place, uris: pa.ChunkedArray) -> int:
    """Leaves in the quarantine only what is of these videos; returns how many rows went."""
    dropped = 0
    for name in file_names(folder):
        with open_file(folder / name) as file:
            rows = file.read()
        kept = rows.filter(pc.is_in(pc.struct_field(rows["source"], "uri"), uris))
        if len(kept) < len(rows):
            if len(kept):
                write_file(folder, kept, rows.schema.metadata)
            (folder / name).unlink()
            dropped += len(rows) - len(kept)
    return dropped


def update_index(
    table: Table,
    columns: list[str] | None = None,
    *,
    anew: bool = False,
    read_parts: ReadParts = read_here,
) -> pa.Table:
    """Brings a table's `index.parquet` up to date; reads only the files that it does not know yet.

    A sample that was written twice, by workers of a killed run that outlived it, is left in one file.

    Args:
        table: its files.
        columns: those to return; None is all. Of millions of rows, each takes memory.
        anew: reads all of the files, whatever the index says.
        read_parts: who reads them.

    Returns:
        One row per sample, ordered by `sample_id`: of the table's small columns, `file` and `row_group`.

    Raises:
        ProPhyError: a file is damaged, or was made with other models or settings.
    """
    found = file_names(table.folder)
    stored, known = _index_schema(table).empty_table(), set[str]()
    if not anew and (table.folder / INDEX).exists():
        with _open(table, INDEX) as file:
            for batch in file.iter_batches(columns=["file"]):
                known.update(batch["file"].unique().to_pylist())
            if known == set(found):
                return file.read(columns)
            stored = file.read()
    if known.difference(found):
        stored = stored.filter(pc.is_in(stored["file"], pa.array(found, pa.string())))
    unread = [name for name in found if name not in known]
    parts = read_parts(f"index {table.folder.name}", partial(_index_files, table), unread)
    rows = pa.concat_tables([stored, *parts])
    order = pc.sort_indices(rows["sample_id"])
    sample_ids = rows["sample_id"].take(order)
    is_first = np.ones(len(rows), bool)
    is_first[1:] = pc.not_equal(sample_ids[1:], sample_ids[:-1])
    index = rows.take(order.filter(pa.array(is_first)))
    if len(index) < len(rows):
        index = _keep(table, rows, index)
    elif known or found:
        write_file(table.folder, index, table.footer, name=INDEX)
    return index if columns is None else index.select(columns)


def drop_samples(table: Table, sample_ids: pa.Array | pa.ChunkedArray) -> None:
    """Takes samples out of a table, by writing the files that hold them anew."""
    dropped = pc.is_in(update_index(table, ["sample_id"])["sample_id"], sample_ids)
    if pc.any(dropped).as_py():
        index = update_index(table)
        _keep(table, index, index.filter(pc.invert(dropped)))


def file_names(folder: Place) -> list[str]:
    """The files of a table, which are named by their content; the index and what is half written are not."""
    return sorted(filter(_CONTENT_NAME.fullmatch, names(folder)))


def stored_table(path: Place, schema: pa.Schema) -> Table:
    """The table that a file belongs to, by its footer.

    Raises:
        DamagedFileError: it has no footer, or not this schema.
        ProPhyError: another version of this program wrote it.
    """
    with open_file(path) as file:
        footer = file.metadata.metadata or {}
        if not VERSION_FOOTER.keys() <= footer.keys():
            raise DamagedFileError(path, "has no footer")
        if not file.schema_arrow.equals(schema):
            raise DamagedFileError(path, "has other columns")
    settings, provenance = (json.loads(footer[key]) for key in (SETTINGS_FOOTER, b"prophy.provenance"))
    if fingerprint_of(settings) != footer[b"prophy.fingerprint"].decode():
        raise DamagedFileError(path, "has a footer that contradicts itself")
    return Table(path.parent, schema, settings, provenance)


def _keep(table: Table, rows: pa.Table, kept: pa.Table) -> pa.Table:
    """Leaves, of the rows that the files hold, those in `kept`; returns the new index.

    Killed at any moment it leaves an index that names no file which is gone: what is kept is written first,
    then the index, and only then old files go.
    """
    before, after = map(_rows_by_file, (rows, kept))
    changed = [name for name in before if after.get(name, 0) < before[name]]
    is_changed = pc.is_in(kept["file"], pa.array(changed, pa.string()))
    parts = [kept.filter(pc.invert(is_changed))]
    left: defaultdict[str, list[int]] = defaultdict(list)
    for row in kept.filter(is_changed).select(["file", "row_group"]).to_pylist():
        left[row["file"]].append(row["row_group"])
    for name in changed:
        if row_groups := sorted(left[name]):
            with _open(table, name) as file:
                part = file.read_row_groups(row_groups)
            written = write_file(table.folder, part, table.footer, row_group_size=1)
            parts.append(_index_files(table, [written.name]))
    index = pa.concat_tables(parts).sort_by("sample_id")
    write_file(table.folder, index, table.footer, name=INDEX)
    for name in set(changed).difference(index["file"].unique().to_pylist()):
        (table.folder / name).unlink()
    return index


def _rows_by_file(index: pa.Table) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in index["file"].value_counts().to_pylist()}


def _index_schema(table: Table) -> pa.Schema:
    small = [field for field in table.schema if not LARGE.items() <= (field.metadata or {}).items()]
    return pa.schema([*small, pa.field("file", pa.string()), pa.field("row_group", pa.int32())])


def _index_files(table: Table, names: list[str]) -> pa.Table:
    """What the index says of the files with these names, in one piece: many small ones take memory."""
    schema, parts = _index_schema(table), list[pa.Table]()
    for name in names:
        with _open(table, name) as file:
            rows = file.read(columns=schema.names[:-2])
        rows = rows.append_column("file", pa.array([name] * len(rows), pa.string()))
        parts.append(rows.append_column("row_group", pa.array(np.arange(len(rows)))).cast(schema))
    return pa.concat_tables(parts).combine_chunks()


@contextmanager
def _open(table: Table, name: str) -> Iterator[pq.ParquetFile]:
    """A file of the table, after its footer was found to be of this table."""
    with open_file(table.folder / name) as file:
        footer = file.metadata.metadata or {}
        if footer.get(b"prophy.fingerprint") != table.footer[b"prophy.fingerprint"]:
            made = json.loads(footer.get(SETTINGS_FOOTER, b"{}"))
            differing = [key for key in table.settings | made if made.get(key) != table.settings.get(key)]
            raise ProPhyError(
                f"{table.folder / name} was made with other settings "
                f"({', '.join(differing)}); set them back, or choose another cache.output"
            )
        yield file
