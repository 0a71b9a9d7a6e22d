"""Lists of videos, with `path`, `caption` and `phenomena`; and WISA-80K's JSON in both of its layouts.

A path is absolute, a URL, or relative to the list; `~` is the home folder. `phenomena` are names of the
taxonomy, as a list or as a text that separates them by ';' or ','; nothing says that they are unknown, an
empty list or 'none' that there are none. Null, NaN, their names as a text, and blank texts say nothing. A row
that cannot be used is left out, and why is told once for all rows of which it is true.
"""

import difflib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.caching.list_files import SUFFIXES, Row, Rows, read_rows
from pipelines.caching.video_files import find_files, gathered, sources_of
from prophy.errors import ProPhyError
from prophy.schema import PRIORS, SOURCE
from prophy.stores import open_store
from prophy.taxonomy import parse_phenomena, parse_phenomenon

logger = logging.getLogger(__name__)

# A video of the input.
VIDEOS = pa.schema(
    [pa.field("source", SOURCE, nullable=False), PRIORS.field("caption"), PRIORS.field("labels")]
)
# The same, of which only the location is known yet.
_NAMED = VIDEOS.set(0, pa.field("source", pa.string(), nullable=False))

_OURS = ("path", "caption", "phenomena")
_WISA = ("file", "video_name", "captions", "en_caption", "physical_annotation", "q0", "q1", "q2")
# WISA-80K names what is seen in three answers, one per branch of physics, which may also be nothing.
_WISA_ANSWERS = ("q0", "q1", "q2")
_NONE = {"none", *(f"no obvious {branch} phenomenon" for branch in ("dynamic", "thermodynamic", "optical"))}
_UNSAID = {"nan", "null", "n/a", "<na>"}  # what programs write into a text file where there is nothing
_UNUSUAL = re.compile(r"(^\.|/\.?)(/|\Z)")  # a path with pieces that say nothing: `//`, `/./`, `/` at its end
_SHOWN = 10  # rows that are named, and names that are no phenomenon


@dataclass(frozen=True)
class Input:
    """The videos of a run, and what of its input cannot be used.

    Attributes:
        videos: `VIDEOS`, in the order of the list, or by name.
        refused: why rows of the list or places of the folder cannot be used, a sentence each.
    """

    videos: pa.Table
    refused: list[str]


class RowError(ValueError):
    """Why a row cannot be used, in words that go for every such row; `detail` is what this one has."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def read_manifest(location: str, names: Sequence[str]) -> Input:
    """The videos of a list, and why rows of it cannot be used.

    Args:
        location: the list.
        names: the taxonomy's.

    Raises:
        ProPhyError: a kind of file that is no list, a damaged one, or one without a column of paths.
    """
    suffix = PurePosixPath(location).suffix.lower()
    if suffix not in SUFFIXES:
        raise ProPhyError(
            f"{location} is no list of videos; set cache.input to a folder, or to a file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    store, path = open_store(location)
    with store.open(path, "rb") as file:
        content = file.read()
    try:
        rows = read_rows(content, suffix, {*_OURS, *_WISA})
    except ValueError as error:
        raise ProPhyError(f"{location} cannot be read as {suffix}: {str(error).splitlines()[0]}") from None
    if not rows.rows:
        raise ProPhyError(f"{location} lists no video; give each a row with 'path'")
    is_wisa = suffix.startswith(".json") and "path" not in rows.columns
    if not rows.columns.keys() & ({"file", "video_name"} if is_wisa else {"path"}):
        found = ", ".join(map(repr, rows.columns.values())) or "none"
        raise ProPhyError(
            f"{location} has no column 'path', which names each row's video; its columns are {found}"
        )
    tell_unused(location, rows, _WISA if is_wisa else _OURS)
    return _Reader(location, is_wisa, names).read(rows.rows)


def tell_unused(location: str, rows: Rows, used: tuple[str, ...]) -> None:
    """Names the columns that are not used, and that column which one of them may be meant to be."""
    if rows.remark:
        logger.info("%s: %s", location, rows.remark)
    unused = []
    for name, written in rows.columns.items():
        if name not in used:
            missing = [column for column in used if column not in rows.columns]
            meant = difflib.get_close_matches(name, missing, n=1, cutoff=0.75)
            unused.append(repr(written) + (f" (did you mean {meant[0]!r}?)" if meant else ""))
    if unused:
        logger.warning("columns of %s that are not used: %s", location, ", ".join(unused))


class _Reader:
    """Makes videos of rows.

    Args:
        location: where the list lies, for messages and for paths in it.
        is_wisa: whether it is WISA-80K's JSON. A bare file name is looked for below its folder: the archives
            of the data set unpack into folders of their own. What an answer names besides the taxonomy's
            phenomena is counted, said, and left out. The physical law is left out: a user's prompt has none.
        names: the taxonomy's.
    """

    def __init__(self, location: str, is_wisa: bool, names: Sequence[str]) -> None:
        self.location, self.is_wisa, self.names = location, is_wisa, names
        self.folder = location.rpartition("/")[0]
        self.strange: Counter[str] = Counter()
        self._by_name: dict[str, list[str]] | None = None

    def read(self, rows: list[Row]) -> Input:
        refused: dict[str, list[tuple[Row, str]]] = {}
        named = gathered(self._videos(rows, refused), _NAMED)
        if self.strange:
            logger.warning(
                "%s names what is no phenomenon of the taxonomy; left out, each so many times: %s",
                self.location,
                _some([f"{name!r} {count}" for name, count in self.strange.most_common()]),
            )
        videos = named.set_column(0, VIDEOS.field("source"), sources_of(named["source"].to_pylist()))
        sentences = [sentence_about(self.location, reason, found) for reason, found in refused.items()]
        return Input(videos, sentences)

    def _videos(self, rows: list[Row], refused: dict[str, list[tuple[Row, str]]]) -> Iterator[dict[str, Any]]:
        """Videos whose `source` is only a location yet; rows that cannot be used join `refused`."""
        for row in rows:
            try:
                if row.error:
                    raise RowError(row.error, row.detail)
                yield self._wisa(row.values) if self.is_wisa else self._ours(row.values)
            except RowError as error:
                refused.setdefault(str(error), []).append((row, error.detail))

    def _ours(self, values: dict[str, Any]) -> dict[str, Any]:
        path = text_of(values, "path")
        if path is None:
            raise RowError("'path' is missing; name the row's video there")
        said = _names(values, "phenomena")
        try:
            labels = None if said is None else [*parse_phenomena(said, self.names)]
        except ProPhyError as error:
            raise RowError(f"'phenomena' has an {error}") from None
        return {
            "source": self._location("path", path),
            "caption": said_text(values, "caption"),
            "labels": labels,
        }

    def _wisa(self, values: dict[str, Any]) -> dict[str, Any]:
        column = "file" if text_of(values, "file") else "video_name"
        name = text_of(values, column)
        if name is None:
            raise RowError("it names no video, and needs 'file' or 'video_name'")
        annotation = values if values.get("physical_annotation") is None else values["physical_annotation"]
        if not isinstance(annotation, dict):
            raise RowError("'physical_annotation' is no JSON object")
        said = [names for answer in _WISA_ANSWERS if (names := _names(annotation, answer)) is not None]
        labels = None
        if said:
            labels = [*parse_phenomena(self._known(itertools.chain(*said)), self.names)]
        caption = said_text(values, "captions") or said_text(values, "en_caption")
        return {
            "source": self._location(column, name, search="/" not in name),
            "caption": caption,
            "labels": labels,
        }

    def _known(self, names: Iterable[str]) -> Iterator[str]:
        """The names of phenomena; others are counted."""
        for name in names:
            try:
                parse_phenomenon(name, self.names)
                yield name
            except ProPhyError:
                self.strange[name] += 1

    def _location(self, column: str, path: str, search: bool = False) -> str:
        found = self._files().get(path, []) if search else []
        if len(found) > 1:
            raise RowError(
                f"{column!r} is the name of more than one file; add its folder", " or ".join(found)
            )
        return locate(self.location, column, found[0] if found else path)

    def _files(self) -> dict[str, list[str]]:
        """The videos below the list's folder, by name."""
        if self._by_name is None:
            self._by_name = {}
            for uri in pc.struct_field(find_files(self.folder).sources, "uri").to_pylist():
                self._by_name.setdefault(uri.rpartition("/")[2], []).append(uri)
        return self._by_name


def locate(location: str, column: str, path: str) -> str:
    """Where a file lies that a row of the list at `location` names in a column.

    Raises:
        RowError: it cannot be the place of a file.
    """
    if "\0" in path:
        raise RowError(f"{column!r} holds a NUL", _short(path))
    if "://" not in location and (path == "~" or path.startswith("~/")):
        path = str(Path.home()) + path[1:]
    if "://" not in path and not path.startswith("/"):
        path = f"{location.rpartition('/')[0]}/{path}"
    if "://" not in path:
        return str(PurePosixPath(path)) if _UNUSUAL.search(path) else path
    try:
        open_store(path)
    except ProPhyError as error:  # a URL of no store that we know
        raise RowError(f"{column!r} names no place that can be opened", str(error)) from None
    return path


def text_of(values: dict[str, Any], column: str) -> str | None:
    """A text of a row, to the character; None where it says nothing.

    Raises:
        RowError: it is no text.
    """
    value = values.get(column)
    if value is None or value != value:  # NaN, which is how pandas writes what is missing
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise RowError(f"{column!r} is no text", _short(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{column!r} holds what is not Unicode, or not UTF-8", _short(value)) from None
    return value if value.strip() else None


def said_text(values: dict[str, Any], column: str) -> str | None:
    """As `text_of`; None too for what programs write where there is nothing.

    Raises:
        RowError: it is no text.
    """
    text = text_of(values, column)
    return None if text is None or text.strip().lower() in {*_UNSAID, "none"} else text


def _names(values: dict[str, Any], column: str) -> list[str] | None:
    """The names in a row without those that mean nothing; None where it says nothing."""
    value = values.get(column)
    if isinstance(value, list):
        pieces = [text_of({column: piece}, column) for piece in value]
    else:
        text = text_of(values, column) or ""
        if text.strip() in ("[]", "()", "set()"):
            return []
        if text.strip().lower() in _UNSAID:
            return None
        pieces = list(re.split("[;,]", text))
    # pandas writes a list, a tuple or a set into a CSV as Python does.
    names = [name for piece in pieces if piece and (name := piece.strip("[](){}'\". \t\r\n").lower())]
    if not names and value != []:
        return None
    return [name for name in names if name not in _NONE]


def sentence_about(location: str, reason: str, found: list[tuple[Row, str]]) -> str:
    """Why some rows cannot be used; the first says what it has."""
    names = [
        f"{row.number}" + (f" (line {row.line})" if row.line not in (None, row.number) else "")
        for row, _ in found
    ]
    detail = found[0][1]
    such = f" ({'first: ' if len(found) > 1 else ''}{detail})" if detail else ""
    return f"row{'s' * (len(found) > 1)} {_some(names)} of {location}: {reason}{such}"


def _some(items: list[str]) -> str:
    """The first items, and how many there are besides."""
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
