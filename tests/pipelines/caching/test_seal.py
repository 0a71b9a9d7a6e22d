"""A file that holds its own digest: which of its bits may change unnoticed."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.caching.seal import sealed
from pipelines.caching.tables import write_file
from prophy.schema import INDEX

ROWS = pa.table({"text": ["prophy.sha256, as somebody wrote it", "0" * 80], "number": [1, 2]})


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_file(tmp_path, ROWS, {b"prophy.input": b"/videos"}, name="named.parquet").read_bytes()


def test_every_flipped_bit_is_noticed(content: bytes) -> None:
    """But in the words that the digest is found by, without which it is a file of before."""
    assert sealed(content) == content
    unnoticed = set()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            if sealed(bytes(flipped)) == flipped:
                unnoticed.add(place)
    key = content.rfind(b"prophy.sha256")
    assert unnoticed <= {*range(key - 1, key + len(b"prophy.sha256") + 2)}


def test_what_is_named_by_its_content_and_what_can_be_made_anew_has_none(tmp_path: Path) -> None:
    for name in ("", INDEX):
        path = write_file(tmp_path, ROWS, {b"prophy.input": b"/videos"}, name=name)
        content = path.read_bytes()
        assert sealed(content) == content
        assert pq.read_schema(path).metadata == {b"prophy.input": b"/videos"}


def test_it_can_be_read_and_written_again(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "named.parquet"
    rows = pq.read_table(path)
    assert rows.equals(ROWS) and rows.schema.metadata[b"prophy.input"] == b"/videos"
    before = path.stat().st_mtime_ns
    write_file(tmp_path, rows, rows.schema.metadata, name=path.name)  # with the digest that it had
    assert path.read_bytes() == content and path.stat().st_mtime_ns == before
