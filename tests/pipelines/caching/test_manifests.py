"""Lists of videos in every format, and WISA-80K's JSON in both layouts with its known traps."""

import codecs
import csv
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.caching.sources import find_videos
from pipelines.caching.video_files import LocalFiles, find_files, sources_of
from prophy.errors import ProPhyError
from prophy.video import VideoError
from tests.wisa import PHENOMENA


def summary(videos: list[dict]) -> list[tuple]:
    return [(Path(video["source"]["uri"]).name, video["caption"], video["labels"]) for video in videos]


EXPECTED = [
    ("a.mp4", "a ball, red; falls", ["collision", "liquid motion"]),
    ("b.mp4", None, None),
    ("c.mp4", "a wall", []),
]


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "phenomena", "extra"])
        writer.writerow(["a.mp4", "a ball, red; falls", "Liquid motion; collision", "1"])
        writer.writerow(["b.mp4", "", "", "2"])
        writer.writerow(["c.mp4", "a wall", "none", "3"])
    records = [
        {"path": "a.mp4", "caption": "a ball, red; falls", "phenomena": ["liquid motion", "collision"]},
        {"path": "b.mp4"},
        {"path": "c.mp4", "caption": "a wall", "phenomena": []},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    for name in ("list.csv", "list.jsonl"):
        videos = find_videos(str(tmp_path / name), PHENOMENA).videos.to_pylist()
        assert summary(videos) == EXPECTED
        assert {Path(video["source"]["uri"]).parent for video in videos} == {tmp_path}


NESTED = {
    "file": "clips/0.mp4",
    "video_id": 7,
    "captions": "Lava flows into the sea.",
    "duration": 4.2,
    "width": 1280,
    "text_bbox_num": 0,
    "label": "liquid motion ",
    "physical_annotation": {
        "phys_law": "Heat moves from the lava to the water.",
        "q0": "liquid motion, gas motion",
        "q1": "Vaporization , solidification",
        "q2": "no obvious optical phenomenon",
        "q3": "yes",
        "q4": "liquid objects appearance, mixing of multiple objects",
        "quantify_n0": [[1.0, 1.1]],
        "quantify_n1": [0, 4],
        "quantify_n2": [20, 1200],
    },
}
FLAT = {
    "file": "1.mp4",
    "en_caption": "A door stands still.",
    "en_caption_1": "A door.",
    "phys_law": "A body at rest stays at rest.",
    "q0": "no obvious dynamic phenomenon",
    "q1": "no obvious thermodynamic phenomenon",
    "q2": "no obvious optical phenomenon",
    "q3": "no",
    "q4": "no change",
    "n0": "wood: 0.5 to 0.7 g/cm³",
    "n1": "5 seconds",
    "n2": "20 to 30 degrees celsius",
    "label": "Solid Objects Appearance",
}


def test_both_layouts_of_wisa(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "shards" / "3").mkdir(parents=True)
    (tmp_path / "shards" / "3" / "1.mp4").write_bytes(b"123")
    (tmp_path / "shards" / "3" / "2.mp4").write_bytes(b"1234")
    by_name = {
        "video_name": "2.mp4",
        "captions": "A flash.",
        "physical_annotation": {"q0": "collision, rigid body motion.", "q1": "", "q2": "Glare, reflection"},
    }
    unlabelled = {"video_name": "none.mp4", "captions": "Nothing is known.", "physical_annotation": {}}
    (tmp_path / "wisa-80k.json").write_text(json.dumps([NESTED, FLAT, by_name, unlabelled]))
    with caplog.at_level(logging.WARNING):
        videos = find_videos(str(tmp_path / "wisa-80k.json"), PHENOMENA).videos.to_pylist()
    assert summary(videos) == [
        ("0.mp4", NESTED["captions"], ["liquid motion", "gas motion", "solidification", "vaporization"]),
        ("1.mp4", FLAT["en_caption"], []),
        ("2.mp4", "A flash.", ["collision", "rigid body motion", "reflection"]),
        ("none.mp4", "Nothing is known.", None),
    ]
    assert [video["source"]["size"] for video in videos] == [0, 3, 4, 0]
    assert videos[1]["source"]["uri"] == str(tmp_path / "shards/3/1.mp4")
    assert (
        "names what is no phenomenon of the taxonomy; left out, each so many times: 'glare' 1" in caplog.text
    )
    assert (
        "not used: 'video_id', 'duration', 'width', 'text_bbox_num', 'label', 'en_caption_1'" in caplog.text
    )


def test_a_bare_name_that_two_folders_have_is_ambiguous(tmp_path: Path) -> None:
    for shard in "12":
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "a.mp4").write_bytes(b"123")
    (tmp_path / "wisa.json").write_text(json.dumps([{"file": "a.mp4"}]))
    with pytest.raises(
        ProPhyError,
        match=r"row 1 of .*: 'file' is the name of more than one file; add its folder \(.*/1/a.mp4 or .*/2/",
    ):
        find_videos(str(tmp_path / "wisa.json"), PHENOMENA)
    (tmp_path / "wisa.json").write_text(json.dumps([{"file": "2/a.mp4"}]))
    [video] = find_videos(str(tmp_path / "wisa.json"), PHENOMENA).videos.to_pylist()
    assert video["source"]["uri"] == str(tmp_path / "2/a.mp4")


def test_a_video_that_two_rows_lead_to_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"123")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "hard.mp4").hardlink_to(tmp_path / "a.mp4")
    paths = [
        "a.mp4",
        "b.mp4",
        "a.mp4",
        "./a.mp4",
        "link.mp4",
        "hard.mp4",
        str(tmp_path / "a.mp4"),
        "gone.mp4",
    ]
    records = [{"path": path, "caption": f"row {row}"} for row, path in enumerate([*paths, "gone.mp4"], 1)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = find_videos(str(tmp_path / "list.jsonl"), PHENOMENA)
    assert summary(found.videos.to_pylist()) == [
        ("a.mp4", "row 1", None),
        ("b.mp4", "row 2", None),
        ("gone.mp4", "row 8", None),
    ]
    assert "left out 6 video(s) that are named twice, or linked to others" in caplog.text


def test_rows_that_cannot_be_used_are_told_with_their_number_and_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        '{"path": "a.mp4", "caption": "good"}',
        '{"path": "b.mp4", "caption": 5}',
        "",
        '{"path": "c.mp4", "caption": ["x", "y"]}',
        '{"path": "d.mp4", "caption": {"en": "x"}}',
        '{"path": "e.mp4", "caption": "bad \\ud83d end"}',
        '{"path": "f.mp4", "phenomena": ["colision"]}',
        '{"path": "g.mp4", "phenomena": 7}',
        '{"path": null, "caption": "x"}',
        '{"path": {"x": 1}}',
        '{"path": "h\\u0000.mp4"}',
        '{"path": "gopher://x/i.mp4"}',
        '["j.mp4"]',
        '{"path": "k.mp4", "path": "l.mp4"}',
        '{"path": "m.mp4", "caption": NaN}',
        '{"path": "n.mp4", "phenomena": [null, "melting"]}',
        '{"path": ',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    found = find_videos(str(tmp_path / "list.jsonl"), PHENOMENA)
    assert summary(found.videos.to_pylist()) == [
        ("a.mp4", "good", None),
        ("m.mp4", None, None),
        ("n.mp4", None, ["melting"]),
    ]
    where = f"of {tmp_path / 'list.jsonl'}:"
    assert found.refused == [
        f"rows 2, 3 (line 4), 4 (line 5) {where} 'caption' is no text (first: 5)",
        f"row 5 (line 6) {where} 'caption' holds what is not Unicode, or not UTF-8 ('bad \\ud83d end')",
        f"row 6 (line 7) {where} 'phenomena' has an unknown phenomenon 'colision'; did you mean 'collision'?",
        f"row 7 (line 8) {where} 'phenomena' is no text (7)",
        f"row 8 (line 9) {where} 'path' is missing; name the row's video there",
        f"row 9 (line 10) {where} 'path' is no text ({{'x': 1}})",
        f"row 10 (line 11) {where} 'path' holds a NUL ('h\\x00.mp4')",
        f"row 11 (line 12) {where} 'path' names no place that can be opened (cannot open gopher://x/i.mp4: "
        f"Protocol not known: gopher)",
        f"row 12 (line 13) {where} it is no JSON object, but each row must be one",
        f"row 13 (line 14) {where} it has 'path' twice; keep one",
        f"row 16 (line 17) {where} it is no JSON object (Expecting value: line 1 column 10 (char 9))",
    ]
    assert found.refused[0] in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"path,caption\na.mp4,x\nb.mp4,\n",
        codecs.BOM_UTF8 + b"path,caption\r\na.mp4,x\r\n\r\nb.mp4,\r\n , \r\n",
        "path,caption\r\na.mp4,x\r\nb.mp4,\r\n".encode("utf-16"),
        b"path\tcaption\na.mp4\tx\nb.mp4\t\n",
        b"path;caption\na.mp4;x\nb.mp4; \n",
        b'Path , CAPTION \na.mp4, "x"\nb.mp4,\n',
        b"caption|path|other\nx|a.mp4|1\n|b.mp4|2\n",
    ],
)
def test_dialects_of_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    found = find_videos(str(tmp_path / "list.csv"), PHENOMENA)
    assert (summary(found.videos.to_pylist()), found.refused) == (
        [("a.mp4", "x", None), ("b.mp4", None, None)],
        [],
    )


def test_cells_of_csv_are_what_was_written(tmp_path: Path) -> None:
    caption = 'two lines,\na "quote", NUL \0, \u2028 and ' + "x" * 200_000
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "caption", "phenomena"], ["a.mp4", caption, "['melting']"]])
        file.write('b.mp4,a 5" nail, as it is,melting\nc.mp4,a 5" nail,"melting;collision;"\n')
        csv.writer(file).writerow(["d.mp4", "a", "Rigid_Body motion., collision"])
    found = find_videos(str(tmp_path / "list.csv"), PHENOMENA)
    assert summary(found.videos.to_pylist()) == [
        ("a.mp4", caption, ["melting"]),
        ("c.mp4", 'a 5" nail', ["collision", "melting"]),
        ("d.mp4", "a", ["collision", "rigid body motion"]),
    ]
    [sentence] = found.refused
    assert sentence.startswith("row 2 (line 4) of ")
    assert sentence.endswith("it has not as many cells as the header; quote a text that holds ',' (4 for 3)")


@pytest.mark.parametrize(
    ("caption", "phenomena", "labels"),
    [
        ("NaN", "nan", None),
        ("None", "none", []),
        ("null", "NULL", None),
        (" N/A ", "[]", []),
        ("<NA>", "()", []),
        ("", "['melting', 'collision']", ["collision", "melting"]),
        ("nan", "('melting',)", ["melting"]),
        ("none", "{'melting', 'collision'}", ["collision", "melting"]),
    ],
)
def test_what_programs_write_into_csv_for_nothing_and_for_lists(
    tmp_path: Path, caption: str, phenomena: str, labels: list[str] | None
) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "caption", "phenomena"], ["a.mp4", caption, phenomena]])
    assert summary(find_videos(str(tmp_path / "list.csv"), PHENOMENA).videos.to_pylist()) == [
        ("a.mp4", None, labels)
    ]


def test_bytes_that_are_not_utf_8_spoil_their_row_alone(tmp_path: Path) -> None:
    content = "path,caption\na.mp4,x\ncaf\xe9.mp4,x\nb.mp4,caf\xe9\n".encode("latin-1")
    (tmp_path / "list.csv").write_bytes(content)
    binary = pa.array([b"x", b"x", b"caf\xe9"], pa.binary())
    paths = pa.array([b"a.mp4", b"caf\xe9.mp4", b"b.mp4"], pa.binary())
    pq.write_table(pa.table({"path": paths, "caption": binary}), tmp_path / "list.parquet")
    as_text = [values.view(pa.string()) for values in (paths, binary)]  # Parquet does not look at it
    pq.write_table(pa.Table.from_arrays(as_text, ["path", "caption"]), tmp_path / "text.parquet")
    for name in ("list.csv", "list.parquet", "text.parquet"):
        found = find_videos(str(tmp_path / name), PHENOMENA)
        assert summary(found.videos.to_pylist()) == [("a.mp4", "x", None)]
        reasons = [sentence.partition(f"of {tmp_path / name}: ")[2] for sentence in found.refused]
        assert reasons == [
            "'path' holds what is not Unicode, or not UTF-8 ('caf\\udce9.mp4')",
            "'caption' holds what is not Unicode, or not UTF-8 ('caf\\udce9')",
        ]


def test_json_may_be_lines_or_an_array_and_hold_every_separator(tmp_path: Path) -> None:
    caption = "1\u20282\u20293\x854\x0b5\x0c6\x1c7 \U0001f600"
    records = [{"path": "a.mp4", "caption": caption}, {"Path ": "b.mp4", "CAPTION": "x"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    escaped = "\r\n".join(map(json.dumps, records))
    for name in ("list.jsonl", "list.json"):
        for text in (
            "\n".join(lines),
            f"\ufeff{escaped}\r\n\n",
            f"[{','.join(lines)}]",
            json.dumps(records, indent=1),
        ):
            (tmp_path / name).write_bytes(text.encode())
            found = find_videos(str(tmp_path / name), PHENOMENA)
            assert (summary(found.videos.to_pylist()), found.refused) == (
                [("a.mp4", caption, None), ("b.mp4", "x", None)],
                [],
            )


def test_kinds_of_parquet_columns(tmp_path: Path) -> None:
    columns = {
        "PATH": pa.array(["a.mp4", "b.mp4", "c.mp4", None]).dictionary_encode(),
        "caption": pa.array(["x", None, "y", "z"], pa.large_string()),
        "phenomena": pa.array([["melting"], [], None, None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    found = find_videos(str(tmp_path / "list.parquet"), PHENOMENA)
    assert summary(found.videos.to_pylist()) == [
        ("a.mp4", "x", ["melting"]),
        ("b.mp4", None, []),
        ("c.mp4", "y", None),
    ]
    assert "row 4 of" in found.refused[0] and "'path' is missing" in found.refused[0]
    # As pandas writes that there is no caption, and one.
    numbers = pa.table({"path": ["a.mp4", "b.mp4"], "caption": [float("nan"), 1.5]})
    pq.write_table(numbers, tmp_path / "list.parquet")
    found = find_videos(str(tmp_path / "list.parquet"), PHENOMENA)
    assert summary(found.videos.to_pylist()) == [("a.mp4", None, None)]
    assert found.refused[0].endswith("'caption' is no text (1.5)")


def test_columns_that_are_not_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "list.csv").write_text("path,captions,phenomenon,fps\na.mp4,x,y,8\n")
    find_videos(str(tmp_path / "list.csv"), PHENOMENA)
    assert (
        "list.csv that are not used: 'captions' (did you mean 'caption'?), 'phenomenon' (did you mean "
        "'phenomena'?), 'fps'" in caplog.text
    )


def test_paths_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    names = [
        "a b.mp4",
        "c#1.mp4",
        "50%20.mp4",
        "two\nlines.mp4",
        "x::y.mp4",
        "'q\".mp4",
        "[1]*?.mp4",
        "é中.mp4",
    ]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * (number + 1))
    (tmp_path / "home" / "h.mp4").write_bytes(b"")
    paths = [*names, "~/h.mp4", "home/../home/h2.mp4", "n/o.mp4", "z" * 5000]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"path": path}) for path in paths))
    found = [
        video["source"] for video in find_videos(str(tmp_path / "list.jsonl"), PHENOMENA).videos.to_pylist()
    ]
    assert [source["size"] for source in found] == [*range(1, len(names) + 1), 0, 0, 0, 0]
    assert found[8]["uri"] == str(tmp_path / "home" / "h.mp4") and found[8]["modified"] > 0
    assert {source["modified"] for source in found[9:]} == {0.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "list.txt",
            "a.mp4",
            "is no list of videos; set cache.input to a folder, or to a file that ends in .par",
        ),
        ("list.csv", "file,caption\na.mp4,x\n", "no column 'path', .* its columns are 'file', 'caption'"),
        ("list.csv", "", "lists no video"),
        ("list.csv", "path,caption\n", "lists no video"),
        ("list.csv", "path,caption, Caption\na.mp4,x,y\n", "has the column 'caption' twice; keep one"),
        (
            "list.csv",
            'path,caption\na.mp4,x\nb.mp4,"a 5 inch nail\nc.mp4,second\n',
            "the row that begins in line 3 has a quote that does not end",
        ),
        ("list.csv", 'path,caption\na.mp4,"a 5" nail"\n', "the row that begins in line 2 has a quote"),
        (
            "list.csv",
            "path,phenomena\na.mp4,colision\n",
            "holds can be used; .* row 1 .*did you mean 'collision'",
        ),
        ("list.jsonl", '{"path":\n"a.mp4"}\n', "none of its lines is a JSON object"),
        ("list.jsonl", '["a.mp4"]\n["b.mp4"]\n', "cannot be read as .jsonl: Extra data"),
        ("list.jsonl", "[" * 100_000, "cannot be read as .jsonl"),
        ("wisa.json", '{"videos": [{"path": "a.mp4"}]}', "no column 'path'.* its columns are 'videos'"),
        ("wisa.json", '[{"captions": "x"}]', "no column 'path'"),
        ("wisa.json", '[{"captions": "x"}, {"file": "a.mp4", "captions": 5}]', "row 1 .* names no video"),
        ("wisa.json", '[{"file": "a.mp4", "q0": 7}]', "row 1 .* 'q0' is no text"),
        ("wisa.json", '[{"file": "a.mp4", "physical_annotation": "x"}]', "row 1 .* is no JSON object"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ProPhyError, match=message) as caught:
        find_videos(str(tmp_path / name), PHENOMENA)
    assert "\n" not in str(caught.value)


@pytest.fixture
def bucket() -> Iterator[str]:
    """An object store in this process's memory, by the same interface as S3."""
    store = fsspec.filesystem("memory")
    store.pipe(
        {
            "/bucket/videos/deep/b.mp4": b"12345",
            "/bucket/videos/a.webm": b"123",
            "/bucket/videos/notes.txt": b"",
        }
    )
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


def test_a_folder_of_many_listed_files_is_asked_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/many/{number}.mp4": b"." * number for number in range(1000)})
    places = [f"{bucket}/many/{number}.mp4" for number in range(999, -1, -1)]
    requests = list[str]()
    for request in ("ls", "info"):
        ask = getattr(MemoryFileSystem, request)

        def counted(*given: Any, request: str = request, ask: Callable[..., Any] = ask, **named: Any) -> Any:
            requests.append(request)
            return ask(*given, **named)

        # Each thread has a store of its own.
        monkeypatch.setattr(MemoryFileSystem, request, counted)
    found = sources_of([*places, f"{bucket}/many/gone.mp4", f"{bucket}/videos/a.webm"]).to_pylist()
    assert [source["size"] for source in found] == [*range(999, -1, -1), 0, 3]
    assert found[1000] == {"uri": f"{bucket}/many/gone.mp4", "size": 0, "modified": 0.0}
    assert sorted(requests) == ["info", "info", "ls"]


def test_object_store_prefixes(bucket: str) -> None:
    found = find_files(f"{bucket}/videos")
    a, b = found.sources.to_pylist()
    assert found.left_out == {".txt": 1}
    assert a["uri"].startswith("memory://") and a["uri"].endswith("/bucket/videos/a.webm")
    assert (a["size"], b["size"]) == (3, 5)
    assert a["modified"] > 1e9
    assert sources_of([b["uri"], a["uri"], b["uri"]]).to_pylist() == [b, a, b]
    assert [video["source"] for video in find_videos(f"{bucket}/videos", PHENOMENA).videos.to_pylist()] == [
        a,
        b,
    ]
    manifest = (
        json.dumps({"path": "videos/a.webm", "caption": "seen"}) + "\n" + json.dumps({"path": "gone.mp4"})
    )
    fsspec.filesystem("memory").pipe("/bucket/list.jsonl", manifest.encode())
    listed, gone = find_videos(f"{bucket}/list.jsonl", PHENOMENA).videos.to_pylist()
    assert (listed["source"]["size"], listed["caption"]) == (3, "seen")
    assert gone["source"]["modified"] == 0


def test_files_of_object_stores_come_here_one_at_a_time(bucket: str) -> None:
    a, b = (file["uri"] for file in find_files(f"{bucket}/videos").sources.to_pylist())
    files = LocalFiles(max_bytes=4)
    with files.open(a) as path:
        assert Path(path).read_bytes() == b"123"
    fsspec.filesystem("memory").rm("/bucket/videos/a.webm")
    # The copy is still here.
    with pytest.raises(VideoError, match="a.webm is broken$"), files.open(a) as path:
        raise VideoError(f"{path} is broken")
    with pytest.raises(VideoError, match="b.mp4 is over the limit: its size is 5"), files.open(b):
        pass
    with pytest.raises(FileNotFoundError), files.open(a):
        pass


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    [video] = find_videos(str(tmp_path), PHENOMENA).videos.to_pylist()
    with (
        pytest.raises(OSError, match="no regular file"),
        LocalFiles(max_bytes=4).open(video["source"]["uri"]),
    ):
        pass


def test_unknown_stores(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="cannot open nosuchscheme://bucket"):
        find_videos("nosuchscheme://bucket", PHENOMENA)


def test_a_path_below_a_file_is_one_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"123")
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.mp4/b.mp4"}))
    [video] = find_videos(str(tmp_path / "list.jsonl"), PHENOMENA).videos.to_pylist()
    assert video["source"] == {"uri": str(tmp_path / "a.mp4/b.mp4"), "size": 0, "modified": 0.0}
