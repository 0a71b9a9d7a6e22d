"""Which videos there are, and what is left of them."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.caching.manifests import VIDEOS
from pipelines.caching.sources import (
    PLANNED,
    changed,
    clips_left,
    find_videos,
    of_videos,
    refusals,
    videos_left,
)
from pipelines.caching.stages import SOURCES, CutVideo, clip_ids
from pipelines.config import VideoLimits
from prophy.errors import ProPhyError
from prophy.schema import ENCODINGS, PRIORS, QUARANTINE
from tests.wisa import PHENOMENA

CLIP_DURATIONS_S = [2.0]


def video(name: str, modified: float = 1.0) -> dict:
    source = {"uri": f"/videos/{name}.mp4", "size": 10, "modified": modified}
    return {"source": source, "caption": None, "labels": None}


def priors_of(source: dict, num_frames: int = 16 * 3, **columns: object) -> list[dict]:
    """Index rows of a video at 8 frames per second."""
    ids = clip_ids(source, source["uri"], num_frames / 8, CLIP_DURATIONS_S)
    row = {
        "source": source,
        "content_hash": source["uri"],
        "fps": 8.0,
        "num_frames": num_frames,
        "vlm_caption": "seen",
    }
    return [
        {"sample_id": key, "start_s": start, "end_s": end, **row, **columns}
        for key, (start, end) in ids.items()
    ]


def listed(*videos: dict) -> pa.Table:
    return pa.Table.from_pylist(list(videos), VIDEOS)


def table(rows: list[dict], schema: pa.Schema = PRIORS) -> pa.Table:
    return pa.Table.from_pylist(rows, pa.schema([field.with_nullable(True) for field in schema]))


def left(videos: list[dict], priors: list[dict], quarantine: list[dict]) -> dict[str, list[str]]:
    found = videos_left(listed(*videos), table(priors), table(quarantine, QUARANTINE), CLIP_DURATIONS_S)
    return {row["source"]["uri"]: row["done"] for row in found.to_pylist()}


def names(videos: list[dict]) -> list[str]:
    return [Path(video["source"]["uri"]).name for video in videos]


def test_a_folder_is_searched_for_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in (
        "b.mp4",
        "deep/a.MOV",
        "deep/er/c.webm",
        "notes.txt",
        "deep/d.jpg",
        "e.jpg",
        "deep/f",
        "._b.mp4",
    ):
        (tmp_path / name).write_bytes(b"123")
    found = find_videos(str(tmp_path), PHENOMENA)
    assert (names(found.videos.to_pylist()), found.refused) == (["b.mp4", "a.MOV", "c.webm"], [])
    assert {video["source"]["size"] for video in found.videos.to_pylist()} == {3}
    assert {video["caption"] for video in found.videos.to_pylist()} == {None}
    assert "no videos by their ending: 2 .jpg, 1 .txt, 1 without an ending" in caplog.text
    assert "left out 1 file(s) named ._*" in caplog.text


def test_links_are_followed_and_lead_to_each_file_once(tmp_path: Path) -> None:
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for folder in (top / "real", elsewhere / "deep"):
        folder.mkdir(parents=True)
    for path in (
        top / "real" / "r.mp4",
        elsewhere / "e.mp4",
        elsewhere / "deep" / "d.mp4",
        tmp_path / "far.mp4",
    ):
        path.write_bytes(path.name.encode())
    (top / "a").symlink_to("real")  # a second way
    (top / "b").symlink_to("../elsewhere")
    (elsewhere / "loop").symlink_to("../top")
    (top / "self").symlink_to("self")
    (top / "0.mp4").symlink_to("real/r.mp4")
    (top / "1.mp4").symlink_to("../far.mp4")
    (top / "gone.mp4").symlink_to("nowhere.mp4")
    (top / "hard.mp4").hardlink_to(top / "real" / "r.mp4")
    found = find_videos(str(top), PHENOMENA)
    assert names(found.videos.to_pylist()) == ["hard.mp4", "1.mp4", "d.mp4", "e.mp4", "gone.mp4"]
    assert [video["source"]["modified"] > 0 for video in found.videos.to_pylist()] == [True] * 4 + [False]


def test_names_that_are_not_utf_8_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"123")
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"123")
    found = find_videos(str(tmp_path), PHENOMENA)
    assert names(found.videos.to_pylist()) == ["a.mp4"]
    assert found.refused == [
        f"{bytes(tmp_path) + b'/caf' + bytes([233]) + b'.mp4'!r} has a name that is not UTF-8; rename it"
    ]


def test_a_manifest_gives_captions_and_labels(tmp_path: Path) -> None:
    rows = [
        {"path": "clips/a.mp4", "caption": "a ball", "phenomena": ["liquid motion", "Collision"], "extra": 1},
        {"path": "/elsewhere/b.mp4", "caption": "", "phenomena": None, "extra": 2},
        {"path": "c.mp4", "caption": None, "phenomena": [], "extra": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")
    (tmp_path / "not_listed.mp4").write_bytes(b"")
    for location in (tmp_path, tmp_path / "manifest.parquet"):
        a, b, c = find_videos(str(location), PHENOMENA).videos.to_pylist()
        assert a["source"]["uri"] == str(tmp_path / "clips/a.mp4")
        assert (a["caption"], a["labels"]) == ("a ball", ["collision", "liquid motion"])
        assert (b["source"]["uri"], b["caption"], b["labels"]) == ("/elsewhere/b.mp4", None, None)
        assert c["labels"] == []


def test_input_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="does not exist"):
        find_videos(str(tmp_path / "nowhere"), PHENOMENA)
    with pytest.raises(ProPhyError, match="no videos in"):
        find_videos(str(tmp_path), PHENOMENA)
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(ProPhyError, match="cannot be read as .parquet"):
        find_videos(str(tmp_path / "text.parquet"), PHENOMENA)
    pq.write_table(pa.table({"file": ["a.mp4"]}), tmp_path / "other.parquet")
    with pytest.raises(ProPhyError, match="no column 'path'"):
        find_videos(str(tmp_path / "other.parquet"), PHENOMENA)
    pq.write_table(pa.table({"path": ["a.mp4"], "phenomena": [["colision"]]}), tmp_path / "typo.parquet")
    with pytest.raises(ProPhyError, match="did you mean 'collision'"):
        find_videos(str(tmp_path / "typo.parquet"), PHENOMENA)


def test_a_rewritten_file_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"123")
    [before] = find_videos(str(tmp_path), PHENOMENA).videos.to_pylist()
    os.utime(tmp_path / "a.mp4", (5, 5))
    [after] = find_videos(str(tmp_path), PHENOMENA).videos.to_pylist()
    assert before["source"] != after["source"]
    rows = table(priors_of(before["source"]))
    assert len(changed(rows, listed(before))) == 0
    assert changed(rows, listed(after)) == rows["sample_id"]
    assert len(changed(rows, listed(video("another")))) == 0
    assert len(of_videos(rows, listed(before))) == 3
    assert len(of_videos(rows, listed(after))) == 0


def test_another_caption_or_other_labels_are_a_change() -> None:
    a = video("a")
    rows = table(priors_of(a["source"], caption="a ball", labels=["collision"]))
    columns = ("caption", "labels")
    same = {**a, "caption": "a ball", "labels": ["collision"]}
    assert len(changed(rows, listed(same), columns)) == 0
    corrections: list[dict[str, Any]] = [{"caption": "a cube"}, {"caption": None}, {"labels": []}]
    for correction in (*corrections, {"labels": None}):
        assert changed(rows, listed({**same, **correction}), columns) == rows["sample_id"]
    unlabelled = table(priors_of(a["source"]))
    assert len(changed(unlabelled, listed(a), columns)) == 0
    assert changed(unlabelled, listed(same), columns) == unlabelled["sample_id"]
    missing = {**same, "source": {**a["source"], "size": 0, "modified": 0.0}}
    assert len(changed(unlabelled, listed(missing), columns)) == 0


def test_videos_with_missing_clips_are_left() -> None:
    a, b, c = video("a"), video("b"), video("c")
    rows_a, rows_b = priors_of(a["source"]), priors_of(b["source"])
    assert left([a, b, c], [*rows_a, *rows_b[:2]], []) == {
        "/videos/b.mp4": sorted(row["sample_id"] for row in rows_b[:2]),
        "/videos/c.mp4": [],
    }
    assert left([video("a", modified=2.0)], rows_a, []) == {"/videos/a.mp4": []}


def test_what_a_cut_made_of_a_video_is_all_of_it(tmp_path: Path) -> None:
    """Also where its last frame is shown shorter than the others."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, width=64, height=64, options={"bf": "0"})
        stream.codec_context.time_base = Fraction(1, 1000)
        packets = list[av.Packet]()
        for number in range(17):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 125 * number, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration = 1
        for packet in packets:
            container.mux(packet)
    found, durations_s = find_videos(str(path.parent), PHENOMENA).videos, [17 / 16]
    [clip] = CutVideo(durations_s, VideoLimits())(
        found.append_column("done", pa.array([[]], pa.list_(pa.string()))).cast(SOURCES)
    )
    priors = table([{key: clip[key][0].as_py() for key in PLANNED if key in clip.column_names}])
    assert clip["num_clips"].to_pylist() == [1]
    assert not len(videos_left(found, priors, QUARANTINE.empty_table(), durations_s))


def test_all_is_left_where_nothing_is_cached() -> None:
    videos, nothing = listed(video("a"), video("b")), (PRIORS.empty_table(), QUARANTINE.empty_table())
    assert videos_left(videos, *nothing, CLIP_DURATIONS_S).to_pylist() == [
        {**row, "done": []} for row in videos.to_pylist()
    ]
    assert len(clips_left(videos, nothing[0], ENCODINGS.empty_table(), nothing[1])) == 0


def test_what_is_in_quarantine_is_not_left() -> None:
    a = video("a")
    rows = priors_of(a["source"])
    whole = {"source": a["source"]}
    clips = [{"source": a["source"], "sample_id": row["sample_id"], "num_clips": 3} for row in rows]
    assert left([a], [], [whole]) == {}
    assert left([a], rows[:2], clips[2:]) == {}
    assert left([a], [], clips) == {}
    assert left([a], [], clips[:1]) == {"/videos/a.mp4": [clips[0]["sample_id"]]}
    assert left([video("a", modified=2.0)], [], [whole]) == {"/videos/a.mp4": []}


def test_what_could_not_be_had_is_told_while_it_is_left() -> None:
    """A run could open neither `a` nor `b`; by now it has the clips of `b`. `c` never was there."""
    a, b, c = video("a"), video("b"), video("c", modified=0.0)
    c["source"]["size"] = 0
    quarantine = table(
        [
            {"source": {**one["source"], "size": 0, "modified": 0.0}, "message": f"cannot open {name}"}
            for name, one in (("a", a), ("b", b), ("c", c))
        ],
        QUARANTINE,
    )
    videos, priors = listed(a, b, c), table(priors_of(b["source"]))
    work = videos_left(videos, priors, quarantine, CLIP_DURATIONS_S)
    assert work["source"].to_pylist() == [a["source"]]
    assert refusals(quarantine, videos, [work]) == ["cannot open a", "cannot open c"]
    clips = clips_left(videos, priors, table([]), quarantine)
    assert refusals(quarantine, videos, [work, clips]) == ["cannot open a", "cannot open b", "cannot open c"]


def test_clips_with_priors_but_no_encodings_are_left_with_a_caption() -> None:
    a, b = video("a"), video("b")
    priors = [*priors_of(a["source"], caption="given"), *priors_of(b["source"])]
    empty = table([], QUARANTINE)
    found = clips_left(listed(a, b), table(priors), table(priors[:2]), empty)
    assert found["sample_id"].to_pylist() == [row["sample_id"] for row in priors[2:]]
    assert found["caption"].to_pylist() == ["given", "seen", "seen", "seen"]
    refused = table([{"source": b["source"], "sample_id": priors[3]["sample_id"]}], QUARANTINE)
    assert len(clips_left(listed(a, b), table(priors), table([]), refused)) == 5
    assert len(clips_left(listed(a), table(priors), table([]), empty)) == 3
    corrected = table(priors_of(a["source"], caption="corrected"))
    assert clips_left(listed(a), corrected, table(priors[:3]), empty)["caption"].to_pylist() == 3 * [
        "corrected"
    ]


def test_a_clip_that_several_paths_lead_to_is_encoded_once() -> None:
    a, b, c = video("a"), video("b"), video("c")
    rows = [row for one in (a, b, c) for row in priors_of(one["source"], content_hash="the same")]
    empty = table([], QUARANTINE)
    for order, first in (([a, b, c], "a"), ([c, b, a], "c"), ([b], "b")):
        found = clips_left(listed(*order), table(rows), table([]), empty)
        assert {source["uri"] for source in found["source"].to_pylist()} == {f"/videos/{first}.mp4"}
        assert len(found) == 3
    refused = table([{"source": a["source"], "sample_id": rows[0]["sample_id"]}], QUARANTINE)
    found = clips_left(listed(a, b), table(rows), table([]), refused)
    assert [source["uri"][8] for source in found["source"].to_pylist()] == ["a", "a", "b"]
