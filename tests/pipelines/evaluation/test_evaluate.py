"""A small comparison from end to end, on Ray: its scores, its report, and what a second run does."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.config import Config, load_config
from pipelines.evaluation import evaluate
from pipelines.evaluation.requests import requests_of
from pipelines.evaluation.videos import FALL
from prophy.errors import ProPhyError
from tests.conftest import tiny_config
from tests.disks import remount, small_disk

SMALL = (
    "evaluate.num_clips=6",
    "evaluate.noise_levels=[0.9]",
    "evaluate.pool.size=1",
)
SCORED = (*SMALL, "evaluate.measures=[loss,captions,routing]")
WHOLE = (
    *SMALL,
    "evaluate.measures=[loss,captions,routing,videos]",
    "evaluate.num_prompts=6",
    "sampling.num_inference_steps=2",
)
WITHOUT = "evaluate.contestants={without: {checkpoint: tiny, scale: 0}}"
BOTH = "evaluate.contestants={without: {checkpoint: tiny, scale: 0}, with: {checkpoint: tiny}}"

Made = dict[Path, int]
Both = tuple[Config, str, list[dict[str, Any]]]


def files(config: Config) -> Made:
    """When each file was written, in nanoseconds."""
    return {
        path: path.stat().st_mtime_ns
        for name in ("scores", "encodings", "videos")
        for path in (config.evaluate.output / name).iterdir()
    }


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Made]:
    """A comparison with one contestant, and what it made."""
    one = tiny_config(tmp_path_factory.mktemp("comparison"), *WHOLE, WITHOUT)
    assert evaluate.run(one) == one.evaluate.output / "report.html"
    return one, files(one)


@pytest.fixture(scope="module")
def both(first: tuple[Config, Made]) -> Both:
    """Where a second contestant was taken in: its report and its scores."""
    config = tiny_config(first[0].run_dir, *WHOLE, BOTH)
    html = evaluate.run(config).read_text()
    return config, html, pq.read_table(config.evaluate.output / "scores.parquet").to_pylist()


@pytest.mark.slow
def test_a_comparison_goes_on_and_takes_in_a_contestant(first: tuple[Config, Made], both: Both) -> None:
    (_, made), (config, _, _) = first, both
    after = files(config)
    assert made.items() <= after.items(), "what was there is not made again"
    new = {path.parent.name for path in after.keys() - made.keys()}
    assert new == {"scores", "videos"}, "the clips are encoded once for all"
    evaluate.run(config)
    assert files(config) == after


@pytest.mark.slow
def test_the_contestants_are_measured_on_the_same(both: Both) -> None:
    _, html, rows = both
    losses = {
        name: {
            row["unit"]: row["value"]
            for row in rows
            if row["measure"] == "loss" and row["contestant"] == name
        }
        for name in ("without", "with")
    }
    assert losses["without"].keys() == losses["with"].keys() and len(losses["without"]) == 6
    assert all(losses["without"][unit] != losses["with"][unit] for unit in losses["without"])
    assert {row["contestant"] for row in rows if row["measure"] == "routing"} == {"with"}
    groups = {row["group"] for row in rows if row["measure"] == "captions"}
    assert groups >= {"sides, two things", "phenomenon, one thing"}
    assert "minus without" in html and "Routing: where, and which" in html and "Semantic experts" in html


@pytest.mark.slow
def test_videos_are_judged(both: Both) -> None:
    config, html, rows = both
    shapes = {
        name: {
            row["unit"]: row["value"]
            for row in rows
            if row["measure"] == "video: shape" and row["contestant"] == name
        }
        for name in ("without", "with")
    }
    assert shapes["without"].keys() == shapes["with"].keys() and len(shapes["with"]) == 6
    assert shapes["without"] != shapes["with"]
    falls = [
        request for request in requests_of(config) if [part.scene.name for part in request.parts] == [FALL]
    ]
    assert sum(row["measure"] == "video: fall" for row in rows) == 2 * len(falls) > 0, "those of each"
    assert "Videos: shapes" in html and "Side by side: without (left) and with (right)" in html
    assert "Falls: the law" not in html, "so few falls make no figure"
    assert len(list((config.evaluate.output / "videos").iterdir())) == 12


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512 << 10) as disk:
        there = f"evaluate.output={disk / 'evaluation'}"
        config = tiny_config(tmp_path / "run", *SCORED, WITHOUT, "evaluate.num_clips=16", there)
        with pytest.raises(ProPhyError, match="No space left.*choose another evaluate.output") as caught:
            evaluate.run(config)
        assert "\n" not in str(caught.value)
        made = files(config)
        assert made and all(path.suffix != ".partial" for path in made)
        remount(disk, "size=8m")
        evaluate.run(config)
        assert made.items() <= files(config).items(), "what was there is not made again"


def test_clips_of_the_cache_and_ones_own_pairs(tiny_cache: Config, tmp_path: Path) -> None:
    clips = sorted((tiny_cache.simulate.output / "clips").glob("*.mp4"))
    pairs = tmp_path / "pairs.csv"
    lines = [f"{path},a ball falls,a candle burns,{clips[0]},mine" for path in clips[1:3]]
    pairs.write_text("path,caption,wrong_caption,wrong_path,kind\n" + "\n".join(lines) + "\n")
    config = load_config(
        "tiny",
        [
            f"run_dir={tmp_path / 'run'}",
            f"cache.input={tiny_cache.cache.input}",
            f"cache.output={tiny_cache.cache.output}",
            "cache.encode_batch_size=1",
            "evaluate.clips=cache",
            f"evaluate.pairs={pairs}",
            *SCORED,
            WITHOUT,
        ],
    )
    evaluate.run(config)
    rows = pq.read_table(config.evaluate.output / "scores.parquet").to_pylist()
    found = {(row["measure"], row["group"]) for row in rows}
    assert found >= {
        ("loss", "everywhere"),
        ("loss", "inside the maps"),
        ("captions", "another clip's"),
        ("captions", "mine"),
        ("laws", "mine"),
    }
    assert sum(row["measure"] == "laws" for row in rows) == 2
    assert all(row["wrong"] > 0 for row in rows if row["measure"] in ("captions", "laws"))
