"""What a comparison denoises, and what is said of lists that cannot be used."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Config, load_config
from pipelines.evaluation.items import CORRELATED, Item, find_items, read_pairs
from prophy.errors import ProPhyError
from prophy.sandbox import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, SCENES, Law
from tests.conftest import tiny_config

PHENOMENON = {scene.name: scene.phenomenon for scene in SCENES}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    config = tiny_config(tmp_path_factory.mktemp("run"), "evaluate.clips_per_law=3", "evaluate.num_clips=40")
    return find_items(config)


def test_every_item_is_a_unit_of_its_own(items: list[Item]) -> None:
    assert len({item.unit for item in items}) == len(items)
    assert len({item.key([]) for item in items}) == len(items)
    assert items[0].key(["one model"]) != items[0].key(["another"])


def test_clips_are_of_combinations_that_are_never_trained(items: list[Item]) -> None:
    clips = [item.clip for item in items if item.is_measured]
    assert len(clips) == 40
    for clip in clips:
        assert clip is not None
        shown = [PHENOMENON[name] for name, _, _ in clip.parts]
        triples = [(colour, side) in HELD_OUT_TRIPLES[PHENOMENON[name]] for name, colour, side in clip.parts]
        assert any(triples) if len(shown) == 1 else frozenset(shown) in HELD_OUT_PAIRS
    assert {len(clip.parts) for clip in clips if clip} == {1, 2}
    assert len({clip.parts for clip in clips if clip}) > 30


def test_twins_differ_from_their_clips_by_the_law_alone(items: list[Item]) -> None:
    twins = [item for item in items if item.wrong and item.wrong[0].measure == "laws"]
    assert {item.wrong[0].kind for item in twins} == set(Law)
    assert len(twins) == 3 * len(Law)
    for item in twins:
        [wrong] = item.wrong
        assert item.clip is not None and wrong.clip is not None and wrong.caption is None
        assert wrong.clip.model_copy(update={"broken": None}) == item.clip
        assert wrong.clip.broken == wrong.kind


def test_captions_alone_are_about_the_phenomena_that_are_correlated(items: list[Item]) -> None:
    alone = [item for item in items if item.clip is None]
    named = {name for pair in CORRELATED for name in pair}
    assert {item.phenomenon for item in alone} == named
    assert len(alone) == 12 * len(named)


def test_what_is_not_measured_is_not_denoised(config: Config) -> None:
    def units(measures: str) -> list[Item]:
        overrides = [f"run_dir={config.run_dir}", f"evaluate.measures={measures}"]
        return find_items(load_config("tiny", overrides))

    assert {wrong.measure for item in units("[laws]") for wrong in item.wrong} == {"laws"}
    assert not any(item.wrong for item in units("[loss]"))
    assert not any(item.is_measured for item in units("[captions]"))


def test_the_sandbox_needs_square_frames(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "backbone.width=80")
    with pytest.raises(ProPhyError, match=r"square clips, and the backbone's are 80x64; set evaluate\.clips"):
        find_items(config)


def test_one_frame_is_no_clip_of_the_sandbox(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"backbone\.num_frames is 1; raise it, or set evaluate\.clips"):
        find_items(tiny_config(tmp_path, "backbone.num_frames=1"))


class SmallCache:
    """Samples by name, with their captions; those that end in `wide` have another shape."""

    def __init__(self, captions: dict[str, str]) -> None:
        self.sample_ids, self._captions = pa.array(captions), captions

    def captions(self) -> pa.Array:
        return pa.array(self._captions.values())

    def by_shape(self, sample_ids: pa.Array) -> dict[tuple[int, ...], pa.Array]:
        names = sample_ids.to_pylist()
        wide = [name for name in names if name.endswith("wide")]
        return {(1,): pa.array([name for name in names if name not in wide]), (2,): pa.array(wide)}

    def version(self, sample_id: str) -> str:
        return f"file of {sample_id}"

    def tell_staging(self) -> None:
        pass


def of_cache(
    captions: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch, num_clips: int
) -> list[Item]:
    monkeypatch.setattr("pipelines.caching.cache.open_cache", lambda config: lambda: SmallCache(captions))
    overrides = ["evaluate.clips=cache", f"evaluate.num_clips={num_clips}", "evaluate.measures=[captions]"]
    return find_items(tiny_config(folder, *overrides))


def test_clips_of_a_cache_are_of_as_many_videos_as_there_are_and_counted_by_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = {f"{video}-{clip}": f"of {video}" for video in "abc" for clip in range(4)}
    items = of_cache(captions, tmp_path, monkeypatch, 5)
    clips = [item.clip.sample for item in items if item.clip is not None]
    assert clips == ["a-0", "b-0", "c-0", "a-1", "b-1"]
    assert [item.unit for item in items] == ["a", "b", "c", "a", "b"]
    for item in items:
        [wrong] = item.wrong
        assert wrong.clip is not None and wrong.clip.sample is not None
        assert wrong.clip.sample.partition("-")[0] != item.unit
    assert len({item.key([]) for item in items}) == 5


def test_a_wrong_caption_differs_from_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captions = {"a-0": "a ball", "a-1": "a ball", "b-0": "a ball", "c-0": "smoke", "d-wide": "rain"}
    with caplog.at_level(logging.INFO):
        items = of_cache(captions, tmp_path, monkeypatch, 5)
    wrong = {
        item.clip and item.clip.sample: [one.clip and one.clip.sample for one in item.wrong] for item in items
    }
    assert wrong == {"a-0": ["c-0"], "a-1": ["c-0"], "b-0": ["c-0"], "c-0": ["a-1"], "d-wide": []}
    assert "5 clips of 4 videos; those of one video count as one" in caplog.text
    assert "1 of 5 clips have no wrong caption: no other video of their shape has another" in caplog.text


def write(folder: Path, text: str) -> str:
    (folder / "pairs.csv").write_text(text)
    return str(folder / "pairs.csv")


def test_a_list_has_pairs_of_captions_and_of_videos(tmp_path: Path) -> None:
    pairs = read_pairs(
        write(
            tmp_path,
            "path,caption,wrong_caption,wrong_path,kind\n"
            "a.mp4,a cat left of a dog,a dog left of a cat,,order\n"
            "/far/b.mp4,a ball falls,,s3://bucket/up.mp4,\n",
        )
    )
    captions, videos = pairs
    assert captions.clip is not None and captions.clip.path == f"{tmp_path}/a.mp4"
    [wrong] = captions.wrong
    assert (wrong.measure, wrong.kind, wrong.caption) == ("captions", "order", "a dog left of a cat")
    [wrong] = videos.wrong
    assert wrong.clip is not None
    assert (wrong.measure, wrong.kind, wrong.clip.path) == ("laws", "your videos", "s3://bucket/up.mp4")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,caption\na.mp4,a ball falls\n", r"row 1 .* of .*pairs\.csv: it names nothing that is wrong"),
        ("path,wrong_path\na.mp4,b.mp4\n", r"row 1 .* of .*pairs\.csv: it has no 'path' or no 'caption'"),
        (
            "path,caption,wrong_caption\na.mp4,a ball, red,a cat\n",
            "it has not as many cells as the header; quote a text that holds ',' .4 for 3.",
        ),
        ("path,caption,wrong_caption\n", r"pairs\.csv lists no pair"),
        ("path,caption,wrong_caption\na.mp4,a ball,a  ball \n", "row 1 .*: its wrong_caption is its caption"),
        ("path,caption,wrong_path\na.mp4,a ball,./a.mp4\n", "row 1 .*: its wrong_path is its path"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProPhyError, match=said):
        read_pairs(write(tmp_path, text))


@pytest.mark.parametrize("nothing", ["nan", "None", " null ", "N/A"])
def test_what_programs_write_where_there_is_nothing_is_nothing(tmp_path: Path, nothing: str) -> None:
    rows = [f"a.mp4,a ball,{nothing},b.mp4,{nothing}", f"a.mp4,a ball,a cat,{nothing},{nothing}"]
    videos, captions = read_pairs(
        write(tmp_path, "path,caption,wrong_caption,wrong_path,kind\n" + "\n".join(rows))
    )
    assert [(wrong.measure, wrong.kind) for wrong in videos.wrong] == [("laws", "your videos")]
    assert [(wrong.measure, wrong.kind) for wrong in captions.wrong] == [("captions", "your captions")]
    with pytest.raises(ProPhyError, match="it has no 'path' or no 'caption'"):
        read_pairs(write(tmp_path, f"path,caption,wrong_caption\na.mp4,{nothing},a cat\n"))


def test_rows_of_a_clip_count_as_one_wherever_they_lie(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "path,caption,wrong_caption\n" + "a.mp4,a ball,a cat\nb.mp4,rain,snow\na.mp4,a ball,a dog\n"
    there = tmp_path / "elsewhere"
    there.mkdir()
    with caplog.at_level(logging.INFO):
        here = [item.unit for item in read_pairs(write(tmp_path, text))]
    assert here == ["a.mp4", "b.mp4", "a.mp4"] == [item.unit for item in read_pairs(write(there, text))]
    assert "3 rows of 2 clips; those of one clip count as one" in caplog.text


def test_laws_alone_without_a_pair_are_told_by_their_key(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"evaluate\.clips_per_law is 0, and 'laws' alone is measured"):
        find_items(tiny_config(tmp_path, "evaluate.measures=[laws]", "evaluate.clips_per_law=0"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"path": "a.mp4", "caption": "a", "wrong_caption": "b", "kind": 3},
            "row 1 .*: 'kind' is no text .3",
        ),
        (
            {"path": "a.mp4", "caption": float("nan"), "wrong_caption": "b"},
            "it has no 'path' or no 'caption'",
        ),
        ({"path": ["a.mp4"], "caption": "a", "wrong_caption": "b"}, "'path' is no text"),
        (
            {"path": "gopher://a/b.mp4", "caption": "a", "wrong_caption": "b"},
            "'path' names no place that can",
        ),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(tmp_path: Path, row: dict[str, object], said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ProPhyError, match=said):
        read_pairs(str(path))


def test_bytes_that_are_no_text_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes("path,caption,wrong_caption\na.mp4,caf\xe9,b\n".encode("latin-1"))
    with pytest.raises(ProPhyError, match="'caption' holds what is not Unicode, or not UTF-8"):
        read_pairs(str(tmp_path / "pairs.csv"))
    columns = {"path": ["a.mp4"], "wrong_caption": ["b"]}
    caption = pa.array([b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table(columns | {"caption": caption}), tmp_path / "pairs.parquet")
    with pytest.raises(ProPhyError, match="'caption' holds what is not Unicode, or not UTF-8"):
        read_pairs(str(tmp_path / "pairs.parquet"))


def test_columns_without_use_are_named_and_home_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        [pair] = read_pairs(write(tmp_path, "path,caption,wrong_captoin,wrong_path\n~/a.mp4,a,b,c.mp4\n"))
    assert "that are not used: 'wrong_captoin' (did you mean 'wrong_caption'?)" in caplog.text
    assert pair.clip is not None and pair.clip.path == str(Path.home() / "a.mp4")


def test_a_list_that_is_not_there_or_no_list_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"none\.csv cannot be read as \.csv"):
        read_pairs(str(tmp_path / "none.csv"))
    with pytest.raises(ProPhyError, match=r"is no list of pairs; set evaluate\.pairs to a file that ends in"):
        read_pairs(str(tmp_path))
