"""`prophy cache verify`: is every file of a cache what it says it is? Loads no model and starts no Ray."""

import hashlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape

from pipelines.caching.tables import exclusive, file_names, stored_table, update_index
from pipelines.config import Config
from pipelines.layout import CacheFolder
from prophy.errors import ProPhyError
from prophy.schema import (
    EMPTY_PROMPT,
    ENCODINGS,
    INDEX,
    INPUT,
    PRIORS,
    QUARANTINE,
    DamagedFileError,
    open_file,
)


def run(config: Config) -> dict[str, int]:
    """Verifies the cache, rebuilds its indices and prints what it found; returns the samples of each table.

    Raises:
        ProPhyError: there is no cache, a run writes to it, another version of this program wrote it,
            something in it is damaged, or no room is left.
    """
    folder = config.cache.output
    if not folder.is_dir():
        raise ProPhyError(f"no cache in {folder}; set cache.output, or run `prophy cache`")
    console = Console(emoji=False)
    with exclusive(folder):
        damaged = verify(folder)
        for sentence in damaged:
            console.print(f"[red]damaged:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        samples = rebuild_indices(folder)
    for name, count in samples.items():
        console.print(f"{name}: {count} samples, index rebuilt", highlight=False)
    if damaged:
        raise ProPhyError(
            f"{len(damaged)} file(s) of {folder} were damaged and set aside; run `prophy cache` to "
            f"make their rows anew"
        )
    return samples


def verify(folder: Path) -> list[str]:
    """Checks name, footer and columns of every file; a sentence for each that is damaged.

    A damaged file gets the ending `.damaged`; then it is no part of the cache any more, and the next
    `prophy cache` makes its rows anew.

    Raises:
        ProPhyError: another version of this program wrote one of them; nothing was set aside.
    """
    check_versions(folder)
    damaged = []
    for place, schema in tables_of(folder):
        damaged += _set_damaged_aside(place, schema)
        for path in (place / EMPTY_PROMPT, place / INPUT):
            if path.exists() and not _is_readable(path):
                damaged.append(_set_aside(path, "holds other bytes than were written"))
    return damaged + _set_damaged_aside(CacheFolder(folder).quarantine, QUARANTINE)


def check_versions(folder: Path) -> None:
    """Refuses a cache of which another version of this program wrote a file."""
    for place, _ in tables_of(folder):
        for name in file_names(place):
            with suppress(DamagedFileError), open_file(place / name):
                pass


def rebuild_indices(folder: Path) -> dict[str, int]:
    """Makes the index of each table anew from its files; returns its rows, by the table's folder.

    Raises:
        ProPhyError: no room is left for an index; the one that was there stays.
    """
    samples: dict[str, int] = {}
    for place, schema in tables_of(folder):
        if names := file_names(place):
            table = stored_table(place, names[0], schema)
            samples[str(place.relative_to(folder))] = len(update_index(table, anew=True))
        else:
            (place / INDEX).unlink(missing_ok=True)
    return samples


def tables_of(folder: Path) -> list[tuple[Path, pa.Schema]]:
    """The folder and the schema of each table of a cache: the priors, then all encodings."""
    cache = CacheFolder(folder)
    encodings = [place for place in sorted(cache.encodings.glob("*")) if place.is_dir()]
    return [(cache.priors, PRIORS), *((place, ENCODINGS) for place in encodings)]


def _set_damaged_aside(folder: Path, schema: pa.Schema) -> list[str]:
    """A sentence for each file that is not what its name or its footer says, or not of the same making."""
    reasons: dict[str, str] = {}
    fingerprints: dict[str, bytes] = {}
    for name in file_names(folder):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not name.startswith(digest):
            reasons[name] = "holds other bytes than its name says"
        elif schema is not QUARANTINE:
            try:
                fingerprints[name] = stored_table(folder, name, schema).footer[b"prophy.fingerprint"]
            except DamagedFileError as error:
                reasons[name] = error.reason
    if fingerprints:
        [(common, _)] = Counter(fingerprints.values()).most_common(1)
        for name, fingerprint in fingerprints.items():
            if fingerprint != common:
                reasons[name] = "was made with other settings than the rest"
    return [_set_aside(folder / name, reason) for name, reason in reasons.items()]


def _is_readable(path: Path) -> bool:
    """Whether a file that is not named by its content agrees with its checksums."""
    try:
        pq.read_table(path, page_checksum_verification=True)
    except OSError:
        return False
    return True


def _set_aside(path: Path, reason: str) -> str:
    path.rename(path.with_name(f"{path.name}.damaged"))
    return f"{path} {reason}"
