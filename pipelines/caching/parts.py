"""The files of a table, a part of them at a time: what reads them says what of a part, not who reads it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import pyarrow as pa

FILES_PER_PART = 64
"""Files that are read as one: a second of small ones, many seconds where they hold 250 MB each."""

ReadPart: TypeAlias = Callable[[list[str]], pa.Table]
"""Makes a table of the files with these names. It can be pickled."""
ReadParts: TypeAlias = Callable[[str, ReadPart, list[str]], Iterable[pa.Table]]
"""Has the parts of these files read; what comes of each follows in their order, and the first error too.

It is called with a word for what is done, what reads a part, and the names of all files.
"""


def parts_of(names: list[str]) -> Iterator[list[str]]:
    """The names, `FILES_PER_PART` at a time."""
    return (names[start : start + FILES_PER_PART] for start in range(0, len(names), FILES_PER_PART))


def read_here(_: str, read: ReadPart, names: list[str]) -> Iterator[pa.Table]:
    """Reads one part after the other in this process; the arguments are those of `ReadParts`."""
    return map(read, parts_of(names))
