"""`prophy cache verify`: is every file of a cache what it says it is? Loads no model.

The files are read as Ray tasks, so that the nodes of a cluster share them; a small cache is read without Ray.
"""

import sys
from collections import Counter
from contextlib import suppress
from functools import partial

import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from pipelines.caching.parts import ReadParts, read_here
from pipelines.caching.seal import sealed
from pipelines.caching.tables import exclusive, file_names, stored_table, update_index
from pipelines.caching.tasks import FileTasks
from pipelines.config import Config
from pipelines.layout import CacheFolder
from prophy.errors import ProPhyError
from prophy.places import Place, fetched, folders, rename, sha256
from prophy.schema import (
    EMPTY_PROMPT,
    ENCODINGS,
    INDEX,
    INPUT,
    PRIORS,
    DamagedFileError,
    open_file,
    reading,
)

# What is found out of each file: what made it, empty where that does not matter, and what is wrong with it.
_FOUND = pa.schema([pa.field("fingerprint", pa.string(), nullable=False), pa.field("reason", pa.string())])


def run(config: Config) -> dict[str, int]:
    """Verifies the cache, rebuilds its indices and prints what it found; returns the samples of each table.

    Raises:
        ProPhyError: there is no cache, a run writes to it, another version of this program wrote it,
            something in it is damaged or cannot be read, or no room is left.
    """
    folder = config.cache.folder
    if not folder.is_dir():
        raise ProPhyError(f"no cache in {folder}; set cache.output, or run `prophy cache`")
    console = Console(emoji=False)
    with exclusive(folder), FileTasks(config) as read_parts:
        damaged = verify(folder, read_parts)
        for sentence in damaged:
            console.print(f"[red]damaged:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        samples = rebuild_indices(folder, read_parts)
    for name, count in samples.items():
        console.print(f"{name}: {count} samples, index rebuilt", highlight=False)
    if damaged:
        raise ProPhyError(
            f"{len(damaged)} file(s) of {folder} were damaged and set aside; run `prophy cache` to "
            f"make their rows anew"
        )
    return samples


def verify(folder: Place, read_parts: ReadParts = read_here) -> list[str]:
    """Checks name, footer and columns of every file; a sentence for each that is damaged.

    A damaged file gets the ending `.damaged`; then it is no part of the cache any more, and the next
    `prophy cache` makes its rows anew.

    Args:
        folder: the cache's.
        read_parts: who reads the files.

    Raises:
        ProPhyError: another version of this program wrote one of them, or the system does not let it be
            read; nothing was set aside.
    """
    reasons: dict[Place, str] = {}
    for place, schema in tables_of(folder):
        reasons |= find_damage(place, schema, read_parts)
        for path in (place / EMPTY_PROMPT, place / INPUT):
            if path.exists() and not _is_intact(path):
                reasons[path] = "holds other bytes than were written"
    reasons |= find_damage(CacheFolder(folder).quarantine, None, read_parts)
    for path in reasons:
        rename(path, f"{path.name}.damaged")
    return [f"{path} {reason}" for path, reason in reasons.items()]


def find_damage(folder: Place, schema: pa.Schema | None, read_parts: ReadParts) -> dict[Place, str]:
    """Why files of a table are not what their name or their footer says, or not of the same making.

    Args:
        folder: the table's.
        schema: a row's; None has only the names checked.
        read_parts: who reads the files.

    Raises:
        ProPhyError: see `verify`.
    """
    names = file_names(folder)
    fingerprints, reasons = list[str](), dict[Place, str]()
    for part in read_parts(f"verify {folder.name}", partial(_check_files, folder, schema), names):
        for fingerprint, reason in zip(*part.to_pydict().values(), strict=True):
            if reason is not None:
                reasons[folder / names[len(fingerprints)]] = reason
            fingerprints.append(sys.intern(fingerprint))  # of millions of files, few differ
    made_by = Counter(filter(None, fingerprints))
    if len(made_by) > 1:
        [(common, _)] = made_by.most_common(1)
        for name, fingerprint in zip(names, fingerprints, strict=True):
            if fingerprint not in ("", common):
                reasons[folder / name] = "was made with other settings than the rest"
    return reasons


def rebuild_indices(folder: Place, read_parts: ReadParts = read_here) -> dict[str, int]:
    """Makes the index of each table anew from its files; returns its rows, by the table's folder.

    Args:
        folder: the cache's.
        read_parts: who reads the files.

    Raises:
        ProPhyError: no room is left for an index; the one that was there stays.
    """
    samples: dict[str, int] = {}
    for place, schema in tables_of(folder):
        if names := file_names(place):
            table = stored_table(place / names[0], schema)
            index = update_index(table, ["sample_id"], anew=True, read_parts=read_parts)
            samples[str(place).removeprefix(f"{folder}/")] = len(index)
        else:
            (place / INDEX).unlink(missing_ok=True)
    return samples


def tables_of(folder: Place) -> list[tuple[Place, pa.Schema]]:
    """The folder and the schema of each table of a cache: the priors, then all encodings."""
    cache = CacheFolder(folder)
    return [(cache.priors, PRIORS), *((place, ENCODINGS) for place in folders(cache.encodings))]


def check_version(path: Place) -> None:
    """Refuses a file that another version of this program wrote, damaged or not.

    Raises:
        ProPhyError: it is one.
    """
    with suppress(DamagedFileError), open_file(path):
        pass


def _check_files(folder: Place, schema: pa.Schema | None, names: list[str]) -> pa.Table:
    """`_FOUND` of each of the files."""
    found = [_check_file(folder / name, schema) for name in names]
    return pa.Table.from_pylist([dict(zip(_FOUND.names, each, strict=True)) for each in found], _FOUND)


def _check_file(path: Place, schema: pa.Schema | None) -> tuple[str, str | None]:
    with reading(path):
        path = fetched(path)
    if schema is not None:
        check_version(path)
    with reading(path):
        digest = sha256(path)
    if not path.name.startswith(digest):
        return "", "holds other bytes than its name says"
    if schema is None:
        return "", None
    try:
        return stored_table(path, schema).footer[b"prophy.fingerprint"].decode(), None
    except DamagedFileError as error:
        return "", error.reason


def _is_intact(path: Place) -> bool:
    """Whether a file that is not named by its content agrees with its digest and its checksums."""
    with reading(path):
        content = path.read_bytes()
    if sealed(content) != content:
        return False
    try:
        with open_file(path) as file:
            file.read()
    except DamagedFileError:
        return False
    return True
