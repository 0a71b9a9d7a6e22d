"""Files of the cache: whole, named by content, indexed, and of one making."""

import hashlib
import platform
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.caching.stages import ENCODINGS_OR_ERROR
from pipelines.caching.tables import (
    Table,
    WriteRows,
    check_written,
    drop_refusals,
    drop_samples,
    exclusive,
    file_names,
    read_quarantine,
    stored_table,
    update_index,
    write_file,
)
from pipelines.caching.verify import rebuild_indices, verify
from prophy.errors import ProPhyError
from prophy.places import Place, folders, names, place_of, write_whole
from prophy.schema import (
    ENCODINGS,
    INDEX,
    INPUT,
    QUARANTINE,
    DamagedFileError,
    latents_columns,
    latents_of,
    open_file,
    text_column,
    text_of,
)
from tests.object_store import make_bucket, num_versions, object_store


def source(name: str, modified: float = 1.0) -> dict:
    return {"uri": f"/videos/{name}.mp4", "size": 10, "modified": modified}


def encoding(sample_id: str) -> dict:
    generator = torch.Generator().manual_seed(sum(sample_id.encode()))
    return {
        "sample_id": sample_id,
        "source": source(sample_id),
        "caption": f"caption of {sample_id}",
        **latents_columns(torch.randn(16, 5, 4, 4, generator=generator)),
        **text_column(text(generator)),
    }


def text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The tensors that a family with two text encoders makes of a text: a table, a vector and a number."""
    return {
        "prompt_embeds": torch.randn(8, 6, generator=generator).bfloat16(),
        "pooled_prompt_embeds": torch.randn(4, generator=generator),
        "num_tokens": torch.tensor(5.0),
    }


def failure(name: str) -> dict:
    error = {"stage": "ReadClip", "error_type": "VideoError", "message": f"{name} is broken", "attempts": 1}
    return {"share": 0.5, "error": {"source": source(name), **error}}


def write(table: Table, *rows: dict) -> dict:
    batch = pa.Table.from_pylist([{"share": 1.0, **row} for row in rows], ENCODINGS_OR_ERROR)
    quarantine = Table(table.folder.parent / "quarantine", QUARANTINE, {"table": "abc"}, {})
    for folder in (table.folder, quarantine.folder):
        folder.mkdir(parents=True, exist_ok=True)
    return WriteRows(table, quarantine)(batch).to_pylist()[0]


def on_disk(table: Table) -> Path:
    return Path(str(table.folder))


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "encodings", ENCODINGS, {"model": "abc", "height": 64}, {"backbone": "tiny"})


def test_rows_come_back_one_by_one_and_bit_for_bit(table: Table) -> None:
    rows = [encoding("b"), encoding("a"), encoding("c")]
    assert write(table, *rows) == {"written": 3, "failed": 0, "share": 3.0, "files": file_names(table.folder)}
    index = update_index(table)
    assert index["sample_id"].to_pylist() == ["a", "b", "c"]
    for entry, row in zip(index.to_pylist(), sorted(rows, key=lambda row: row["sample_id"]), strict=True):
        assert entry["latents_shape"] == [16, 5, 4, 4]
        [read] = pq.ParquetFile(table.folder / entry["file"]).read_row_group(entry["row_group"]).to_pylist()
        assert read == row
        generator = torch.Generator().manual_seed(sum(row["sample_id"].encode()))
        assert torch.equal(latents_of(read), torch.randn(16, 5, 4, 4, generator=generator))
        torch.testing.assert_close(text_of(read), text(generator), rtol=0, atol=0)


def test_a_file_is_named_by_its_bytes_and_says_what_made_it(table: Table) -> None:
    write(table, encoding("a"))
    [file] = on_disk(table).glob("*.parquet")
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()
    assert pq.read_schema(file).equals(ENCODINGS)
    footer = pq.ParquetFile(file).metadata.metadata
    assert footer[b"prophy.schema_version"] == b"5"
    assert b'"backbone": "tiny"' in footer[b"prophy.provenance"]
    write(table, encoding("a"))
    assert len(list(on_disk(table).glob("*.parquet"))) == 1


def test_errors_go_to_quarantine(table: Table) -> None:
    assert write(table, failure("x"), encoding("a"), failure("y")) == {
        "written": 1,
        "failed": 2,
        "share": 2.0,
        "files": [*file_names(table.folder), *file_names(table.folder.parent / "quarantine")],
    }
    rows = read_quarantine(table.folder.parent / "quarantine")
    assert rows.schema.equals(QUARANTINE)
    assert rows["message"].to_pylist() == ["x is broken", "y is broken"]
    assert len(read_quarantine(table.folder.parent / "quarantine", {"table": "abc"})) == 2
    assert len(read_quarantine(table.folder.parent / "quarantine", {"table": "another"})) == 0
    assert update_index(table)["sample_id"].to_pylist() == ["a"]


def test_a_row_without_a_column_is_not_written(table: Table) -> None:
    row = encoding("a")
    del row["caption"]
    with pytest.raises(ValueError, match="caption"):
        write(table, row)
    assert not file_names(table.folder)


def test_the_index_follows_the_files(table: Table) -> None:
    write(table, encoding("a"), encoding("b"))
    write(table, encoding("b"), encoding("c"))  # a task that Ray repeated in another batch
    index = update_index(table)
    assert index["sample_id"].to_pylist() == ["a", "b", "c"]
    assert pq.read_table(table.folder / INDEX).equals(index)
    in_files = [
        row for name in file_names(table.folder) for row in pq.read_table(table.folder / name).to_pylist()
    ]
    assert sorted(row["sample_id"] for row in in_files) == ["a", "b", "c"]  # each once, for every reader
    assert {row["sample_id"]: row for row in in_files}["b"] == encoding("b")

    before = (on_disk(table) / INDEX).stat().st_mtime_ns
    assert update_index(table).equals(index)
    assert (on_disk(table) / INDEX).stat().st_mtime_ns == before

    lost = index.filter(pa.compute.equal(index["sample_id"], "a"))["file"][0].as_py()
    (table.folder / lost).unlink()
    left = index.filter(pa.compute.not_equal(index["file"], lost))["sample_id"].to_pylist()
    assert "c" in left and update_index(table)["sample_id"].to_pylist() == left
    (table.folder / INDEX).unlink()
    assert update_index(table)["sample_id"].to_pylist() == left


def test_dropping_samples_keeps_their_neighbours(table: Table) -> None:
    rows = {name: encoding(name) for name in "abcd"}
    write(table, rows["a"], rows["b"])
    write(table, rows["c"])
    write(table, rows["d"])
    drop_samples(table, pa.array(["a", "c"]))
    index = update_index(table)
    assert index["sample_id"].to_pylist() == ["b", "d"]
    files = {file.name for file in on_disk(table).glob("*.parquet")} - {INDEX}
    assert files == set(index["file"].to_pylist())
    for entry in index.to_pylist():
        [read] = pq.ParquetFile(table.folder / entry["file"]).read_row_group(entry["row_group"]).to_pylist()
        assert read == rows[entry["sample_id"]]


def test_files_of_another_making_are_refused(table: Table) -> None:
    write(table, encoding("a"))
    update_index(table)
    other = Table(table.folder, ENCODINGS, {"model": "abc", "height": 128}, {"backbone": "tiny"})
    with pytest.raises(ProPhyError, match=r"other settings \(height\)"):
        update_index(other)
    renamed = Table(table.folder, ENCODINGS, table.settings, {"backbone": "the same under another name"})
    assert update_index(renamed)["sample_id"].to_pylist() == ["a"]


def test_a_damaged_file_is_named(table: Table) -> None:
    write(table, encoding("a"))
    [file] = on_disk(table).glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ProPhyError, match=f"{file} is damaged"):
        update_index(table)


def damage(file: Path, footer: bool) -> None:
    """Another byte in the first page, or a footer of which only its length and the magic bytes are whole."""
    content = bytearray(file.read_bytes())
    if footer:
        length = int.from_bytes(content[-8:-4], "little")
        content[-8 - length : -8] = b"\xff" * length
    else:
        content[200] ^= 1
    file.write_bytes(content)


def test_damaged_pages_and_footers_are_named(table: Table) -> None:
    write(table, encoding("a"), encoding("b"))
    update_index(table)
    [file] = (on_disk(table) / name for name in file_names(table.folder))
    damage(file, footer=False)
    with pytest.raises(ProPhyError, match=f"{file} is damaged"):
        drop_samples(table, pa.array(["b"]))
    assert file.exists()
    damage(file, footer=True)
    with pytest.raises(DamagedFileError, match=f"{file} is damaged"):
        stored_table(file, ENCODINGS)
    (table.folder / INDEX).unlink()
    with pytest.raises(ProPhyError, match=f"{file} is damaged"):
        update_index(table)


def test_what_the_system_does_not_let_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    loop = tmp_path / "loop.parquet"
    loop.symlink_to(loop)
    with (
        pytest.raises(ProPhyError, match=r"cannot be read \(Too many levels of symbolic links\)"),
        open_file(loop),
    ):
        pass


def test_a_damaged_quarantine_is_named(table: Table) -> None:
    write(table, failure("x"))
    folder = on_disk(table).parent / "quarantine"
    [name] = file_names(folder)
    damage(folder / name, footer=True)
    with pytest.raises(ProPhyError, match=f"{folder / name} is damaged"):
        read_quarantine(folder)


WRITE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from pipelines.caching.tables import write_file
for number in range(10**6):
    write_file(Path(sys.argv[1]), pa.table({"x": np.full(200_000, number)}), {b"k": b"v"})
"""


def test_a_killed_writer_leaves_only_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(folder)])
        count = len(list(folder.glob("*.parquet")))
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.parquet"))) < count + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (folder / f".{uuid.uuid4().hex}.tmp").write_bytes(b"half a file")
    foreign = folder / ".notes.tmp"
    foreign.write_bytes(b"of somebody else")
    with exclusive(folder):
        assert foreign.exists()
        files = sorted(file for file in folder.iterdir() if file.name not in (".lock", foreign.name))
        assert len(files) >= 6
        for file in files:
            assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with exclusive(folder), pytest.raises(ProPhyError, match="another run writes to"), exclusive(folder):
        pass
    with exclusive(folder):
        pass


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProPhyError, match="cannot write to"), exclusive(tmp_path / "file" / "cache"):
        pass


def test_a_worker_makes_no_folder_where_it_does_not_see_the_cache(table: Table) -> None:
    batch = pa.Table.from_pylist([{"share": 1.0, **encoding("a")}], ENCODINGS_OR_ERROR)
    with pytest.raises(
        ProPhyError, match=f"^node {platform.node()} does not see {table.folder}; mount there"
    ):
        WriteRows(table, table)(batch)
    assert not table.folder.exists()


def test_files_that_went_elsewhere_are_told(tmp_path: Path) -> None:
    folders = [tmp_path / "cache" / "priors", tmp_path / "cache" / "quarantine"]
    for folder in folders:
        folder.mkdir(parents=True)
    files = [write_file(folder, pa.table({"x": [1]}), {b"k": folder.name.encode()}) for folder in folders]
    check_written([file.name for file in files], folders)
    files[1].unlink()
    with pytest.raises(
        ProPhyError, match=f"^1 of 2 files that nodes wrote are not in {tmp_path / 'cache'}: "
    ):
        check_written([file.name for file in files], folders)


def test_index_of_nothing_is_not_written(table: Table) -> None:
    assert len(update_index(table)) == 0
    assert not table.folder.exists()
    table.folder.mkdir(parents=True, exist_ok=True)
    assert write_file(table.folder, pa.table({"x": [1]}), {}, name="other.parquet").exists()
    assert len(update_index(table)) == 0


def fill(folder: Place) -> dict[str, bytes]:
    """Writes to a cache in every way there is; returns all of its files."""
    table = Table(folder / "encodings" / "one", ENCODINGS, {"model": "abc"}, {"backbone": "tiny"})
    with exclusive(folder):
        quarantine = Table(folder / "quarantine", QUARANTINE, {"table": "abc"}, {})
        for place in (table.folder, quarantine.folder):
            place.mkdir(parents=True, exist_ok=True)
        for rows in ([encoding("a"), failure("x"), encoding("b")], [encoding("b"), failure("y")]):
            batch = pa.Table.from_pylist([{"share": 1.0, **row} for row in rows], ENCODINGS_OR_ERROR)
            [counts] = WriteRows(table, quarantine)(batch).to_pylist()
            check_written(counts["files"], [table.folder, quarantine.folder])
            update_index(table)
        write_file(table.folder, pa.table({"x": [1]}), {b"k": b"v"}, name=INPUT)
        drop_samples(table, pa.array(["a"]))
        assert len(read_quarantine(quarantine.folder)) == 2
        assert drop_refusals(quarantine.folder, pa.chunked_array([["/videos/x.mp4"]])) == 1
        write_whole(folder / "quarantine" / f"{64 * 'a'}.parquet", b"damaged")
        (table.folder / INDEX).unlink()
        assert rebuild_indices(folder) == {"encodings/one": 1}
        [sentence] = verify(folder)
        assert sentence == f"{folder}/quarantine/{64 * 'a'}.parquet holds other bytes than its name says"
        [row] = update_index(table).to_pylist()
        with open_file(table.folder / row["file"]) as file:
            assert file.read_row_group(row["row_group"]).to_pylist() == [encoding("b")]
    places = [*folders(folder / "encodings"), quarantine.folder]
    return {f"{place.name}/{name}": (place / name).read_bytes() for place in places for name in names(place)}


def test_tables_in_s3_are_those_of_a_disk(tmp_path: Path) -> None:
    with object_store() as store:
        make_bucket(store, "tables")
        here, there = fill(tmp_path), fill(place_of("s3://tables/cache", "cache.output"))
        written = num_versions(store, "tables")
    assert here == there and len(here) == 5
    rows = [key for key in written if re.search(r"[0-9a-f]{64}\.parquet$", key)]
    assert rows and {key: written[key] for key in rows} == dict.fromkeys(rows, 1), "none was written twice"
