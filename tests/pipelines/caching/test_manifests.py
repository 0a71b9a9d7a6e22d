"""Lists of videos in every format, and WISA-80K's JSON in both layouts with its known traps."""

import csv
import json
import logging
from pathlib import Path

import fsspec
import pytest

from pipelines.caching.sources import find_videos
from pipelines.caching.video_files import LocalFiles, find_files, source_of
from prophy.errors import ProPhyError
from prophy.video import VideoError


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
        videos = find_videos(str(tmp_path / name))
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
        "physical_annotation": {"q2": "Glare, reflection"},
    }
    unlabelled = {"video_name": "none.mp4", "captions": "Nothing is known.", "physical_annotation": {}}
    (tmp_path / "wisa-80k.json").write_text(json.dumps([NESTED, FLAT, by_name, unlabelled]))
    with caplog.at_level(logging.WARNING):
        videos = find_videos(str(tmp_path / "wisa-80k.json"))
    assert summary(videos) == [
        ("0.mp4", NESTED["captions"], ["liquid motion", "gas motion", "solidification", "vaporization"]),
        ("1.mp4", FLAT["en_caption"], []),
        ("2.mp4", "A flash.", ["reflection"]),
        ("none.mp4", "Nothing is known.", None),
    ]
    assert [video["source"]["size"] for video in videos] == [0, 3, 4, 0]
    assert videos[1]["source"]["uri"] == str(tmp_path / "shards/3/1.mp4")
    assert "names 1 times what is no phenomenon of the taxonomy, such as 'glare'" in caplog.text


def test_a_bare_name_that_two_folders_have_is_ambiguous(tmp_path: Path) -> None:
    for shard in "12":
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "a.mp4").write_bytes(b"123")
    (tmp_path / "wisa.json").write_text(json.dumps([{"file": "a.mp4"}]))
    with pytest.raises(ProPhyError, match=r"'a.mp4' in .* may be .*/1/a.mp4 or .*/2/a.mp4; add its folder"):
        find_videos(str(tmp_path / "wisa.json"))
    (tmp_path / "wisa.json").write_text(json.dumps([{"file": "2/a.mp4"}]))
    [video] = find_videos(str(tmp_path / "wisa.json"))
    assert video["source"]["uri"] == str(tmp_path / "2/a.mp4")


def test_a_video_that_is_listed_twice_is_cached_once(tmp_path: Path) -> None:
    records = [
        {"path": "a.mp4", "caption": "first"},
        {"path": "b.mp4"},
        {"path": "a.mp4", "caption": "second"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert summary(find_videos(str(tmp_path / "list.jsonl"))) == [
        ("a.mp4", "first", None),
        ("b.mp4", None, None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "a.mp4", "is no list of videos; give a folder, or a file that ends in .parquet, .csv"),
        ("list.csv", "file,caption\na.mp4,x\n", "no 'path'"),
        ("list.jsonl", '{"path": "a.mp4"}\n{"path": ', "cannot be read as .jsonl"),
        (
            "list.jsonl",
            '{"path": "a.mp4"}\n["b.mp4"]\n',
            r"read as .jsonl: \['b.mp4'\] is no object with 'path'",
        ),
        ("wisa.json", '{"file": "a.mp4"}', "is a list of records"),
        ("wisa.json", '[{"captions": "x"}]', "record 0 of .* names no video"),
        ("list.csv", "path,phenomena\na.mp4,colision\n", "did you mean 'collision'"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ProPhyError, match=message):
        find_videos(str(tmp_path / name))


@pytest.fixture
def bucket() -> str:
    """An object store in this process's memory, by the same interface as S3."""
    store = fsspec.filesystem("memory")
    store.pipe(
        {"/bucket/videos/deep/b.mp4": b"12345", "/bucket/videos/a.webm": b"123", "/bucket/notes.txt": b""}
    )
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


def test_object_store_prefixes(bucket: str) -> None:
    a, b = find_files(f"{bucket}/videos")
    assert a["uri"].startswith("memory://") and a["uri"].endswith("/bucket/videos/a.webm")
    assert (a["size"], b["size"]) == (3, 5)
    assert a["modified"] > 1e9
    assert source_of(b["uri"]) == b
    assert [video["source"] for video in find_videos(f"{bucket}/videos")] == [a, b]
    manifest = (
        json.dumps({"path": "videos/a.webm", "caption": "seen"}) + "\n" + json.dumps({"path": "gone.mp4"})
    )
    fsspec.filesystem("memory").pipe("/bucket/list.jsonl", manifest.encode())
    listed, gone = find_videos(f"{bucket}/list.jsonl")
    assert (listed["source"]["size"], listed["caption"]) == (3, "seen")
    assert gone["source"]["modified"] == 0


def test_files_of_object_stores_come_here_one_at_a_time(bucket: str) -> None:
    a, b = (file["uri"] for file in find_files(f"{bucket}/videos"))
    files = LocalFiles(max_bytes=4)
    with files.open(a) as path:
        assert Path(path).read_bytes() == b"123"
    fsspec.filesystem("memory").rm("/bucket/videos/a.webm")
    with (
        pytest.raises(VideoError, match="a.webm is broken$"),
        files.open(a) as path,
    ):  # the copy is still here
        raise VideoError(f"{path} is broken")
    with pytest.raises(VideoError, match="b.mp4 is over the limit: its size is 5"), files.open(b):
        pass
    with pytest.raises(FileNotFoundError), files.open(a):
        pass


def test_unknown_stores(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="cannot open nosuchscheme://bucket"):
        find_videos("nosuchscheme://bucket")


def test_a_path_below_a_file_is_one_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"123")
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.mp4/b.mp4"}))
    [video] = find_videos(str(tmp_path / "list.jsonl"))
    assert video["source"] == {"uri": str(tmp_path / "a.mp4/b.mp4"), "size": 0, "modified": 0.0}
