"""The report of made-up scores: no figure without its interval."""

import logging
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import Config
from pipelines.evaluation import report
from pipelines.evaluation.report import interval, number
from prophy.evaluation.statistics import Estimate
from prophy.video import write_video
from tests.conftest import tiny_config

NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?"
INTERVAL = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


def scores(contestants: list[str], units: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "contestant": name,
            "measure": measure,
            "group": group,
            "unit": f"clip {unit}",
            "level": 0.9,
            "value": float(rng.uniform(0.2, 0.4)),
            "wrong": float(rng.uniform(0.2, 0.4)),
        }
        for name in contestants
        for measure, group in (("loss", "everywhere"), ("captions", "sides"), ("laws", "gravity"))
        for unit in range(units)
    ]


def tables(path: Path) -> list[list[list[str]]]:
    """The cells of all rows of all tables, headers first."""
    html = path.read_text()
    return [
        [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        for table in re.findall(r"<table>(.*?)</table>", html, flags=re.DOTALL)
    ]


def test_every_figure_has_its_interval(config: Config) -> None:
    config.evaluate.output.mkdir(parents=True)
    found = tables(report.write(config, ["first", "second"], scores(["first", "second"], 12), {}))
    assert len(found) == 5
    detectable = list[str]()
    for header, *rows in found:
        assert rows
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            assert re.fullmatch(INTERVAL, cells["value"]), cells
            assert cells["clips"].isdecimal()
            difference = cells["minus first"]
            if cells["contestant"] == "first":
                assert not difference
            else:
                assert re.fullmatch(INTERVAL, difference), cells
                assert cells["pairs"].isdecimal()
                detectable.append(cells["detectable"])
    said = [float(value) for value in detectable if value]
    assert len(said) > len(detectable) / 2 and min(said) > 0, detectable


def test_what_has_no_interval_is_not_in_the_report(config: Config) -> None:
    config.evaluate.output.mkdir(parents=True)
    path = report.write(config, ["first"], scores(["first"], 5), {})
    assert not tables(path)
    assert "0." not in re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)


def test_what_is_no_number_is_named_once_in_report_and_log(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config.evaluate.output.mkdir(parents=True)
    rows = scores(["first", "second"], 12)
    for row in rows:
        if row["contestant"] == "second" and row["unit"] in ("clip 3", "clip 5"):
            row["value"] = float("nan")
    with caplog.at_level(logging.WARNING):
        path = report.write(config, ["first", "second"], rows, {})
    said = "contestant 'second' gives no finite loss on 2 of 12 clips (left out)"
    assert caplog.text.count(said) == 1
    html = unescape(path.read_text())
    assert html.count(said.removeprefix("c")) == 1 and "nan" not in "".join(map(str, tables(path)))
    for header, *found in tables(path):
        clips = {row[header.index("contestant")]: row[header.index("clips")] for row in found}
        assert clips == {"first": "12", "second": "10"}


def test_captions_that_are_cut_to_the_same_are_told(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    config.evaluate.output.mkdir(parents=True)
    rows = scores(["first"], 12)
    for row in rows:
        if row["measure"] == "captions" and row["unit"] in ("clip 1", "clip 2", "clip 3"):
            row["wrong"] = row["value"]
    with caplog.at_level(logging.WARNING):
        html = unescape(report.write(config, ["first"], rows, {}).read_text())
    said = (
        "3 of 36 wrong captions and clips are the same as the right one to all contestants, and count as half"
    )
    assert said in html and said in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluate.clips=sandbox"], "Loss of clips never trained on"),
        (["evaluate.clips=cache", "train.num_held_out=3"], "Loss of held-out clips"),
        (["evaluate.clips=cache", "train.num_held_out=0"], "Loss of clips of the cache"),
    ],
)
def test_the_heading_of_losses_says_which_clips_they_are_of(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    config = tiny_config(tmp_path, *settings)
    config.evaluate.output.mkdir(parents=True)
    html = report.write(config, ["first"], scores(["first"], 6), {}, ["one thing to know"]).read_text()
    assert [title for title in re.findall("<h2>(.*?)</h2>", html) if "Loss" in title] == [said]
    assert "One thing to know." in html


def test_videos_that_were_removed_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tmp_path, "evaluate.shown=1")
    config.evaluate.output.mkdir(parents=True)
    rows = [
        row | {"measure": "video: what", "level": None, "wrong": None, "value": float(name == "second")}
        for name in ("first", "second")
        for row in scores([name], 6)[:6]
    ]
    videos = {
        name: {f"clip {unit}": tmp_path / f"{name}-{unit}.mp4" for unit in range(6)}
        for name in ("first", "second")
    }
    with caplog.at_level(logging.WARNING):
        assert "Side by side" not in report.write(config, ["first", "second"], rows, videos).read_text()
    assert "6 of 6 prompts cannot be shown: their videos were removed" in caplog.text
    for name in videos:
        write_video(videos[name]["clip 4"], np.zeros((17, 64, 64, 3), np.uint8), 8.0)
    html = report.write(config, ["first", "second"], rows, videos).read_text()
    assert "second wins: clip 4" in html, "of one video that is shown, a win"


def test_names_with_commas_are_told_apart(config: Config) -> None:
    config.evaluate.output.mkdir(parents=True)
    names = ["backbone", "LoRA", "LoRA, SEB"]
    html = unescape(report.write(config, names, scores(names, 6), {}).read_text())
    assert 'Compared with "backbone": "LoRA", "LoRA, SEB".' in html


def test_figures_have_three_digits() -> None:
    assert interval(Estimate(0.12345, -0.1, 1234.5, 9), signed=True) == "+0.123 [-0.1, +1234]"
    assert number(0.000012345) == "1.23e-05"
