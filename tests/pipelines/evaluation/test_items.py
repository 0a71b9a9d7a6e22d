"""What a comparison denoises, and what is said of lists that cannot be used."""

from pathlib import Path

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
        ("path,caption\na.mp4,a ball falls\n", r"row 1 of .*pairs\.csv names nothing that is wrong"),
        ("path,wrong_path\na.mp4,b.mp4\n", r"row 1 of .*pairs\.csv has no 'path' or no 'caption'"),
        ("path,caption,wrong_caption\n", r"pairs\.csv lists no pair"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProPhyError, match=said):
        read_pairs(write(tmp_path, text))


def test_a_list_that_is_not_there_or_no_list_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"none\.csv cannot be read as \.csv"):
        read_pairs(str(tmp_path / "none.csv"))
    with pytest.raises(ProPhyError, match=r"is no list of pairs; set evaluate\.pairs to a file that ends in"):
        read_pairs(str(tmp_path))
