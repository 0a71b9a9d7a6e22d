"""`prophy cache inspect` and `prophy cache explain` on the tiny cache: what they print and draw."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.caching import inspect
from pipelines.caching.sources import find_videos
from pipelines.caching.tables import file_names
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.places import Place, sizes
from prophy.schema import ROW_FILES
from prophy.video import write_video
from tests.hostile import FPS, moving_square
from tests.wisa import PHENOMENA


def colourful_rows(sheet: Path) -> int:
    """Strips of 96 pixels in which something is drawn beside the label."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))[:, inspect._LABEL_WIDTH :]
    return int((pixels.max((1, 2)) > 60).sum()) // inspect._HEIGHT


def test_inspect_while_files_are_written_and_removed(
    tiny_cache: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_one(folder: Place) -> dict[str, int]:
        found = sizes(folder)
        del found[file_names(folder)[0]]
        return found

    monkeypatch.setattr(inspect, "sizes", without_one)
    inspect.inspect(tiny_cache, 1, tmp_path / "sheet.png")
    assert "priors" in capsys.readouterr().out


def test_inspect(tiny_cache: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.inspect(tiny_cache, 3, tmp_path / "deep" / "sheet.png")
    printed = capsys.readouterr().out
    assert f"of {tiny_cache.cache.input}, the input of the last run: 12 videos, 12 clips of 24 s" in printed
    assert "0 videos that are not in it" in printed
    assert "0 clips without a given caption" in printed
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width == inspect._LABEL_WIDTH + inspect._COLUMNS * 96
    # Each of the three has frames, and at least a background map.
    assert colourful_rows(tmp_path / "deep" / "sheet.png") >= 3 * 2


def test_explain(tiny_cache: Config, tmp_path: Path) -> None:
    video = find_videos(tiny_cache.cache.input, PHENOMENA).videos.to_pylist()[0]["source"]["uri"]
    inspect.explain(tiny_cache, video, ["collision", "combustion"], tmp_path / "explain.png")
    assert colourful_rows(tmp_path / "explain.png") >= 1 + 3 * (1 + 4)  # three questions, four layers


def test_explain_shows_the_vlm_all_of_a_video_shorter_than_a_clip(
    tiny_cache: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "short.mp4", moving_square(8), FPS)
    with caplog.at_level(logging.INFO):
        inspect.explain(tiny_cache, str(tmp_path / "short.mp4"), ["melting"], tmp_path / "explain.png")
    assert "short.mp4 lasts 1.00 s, less than a clip; the VLM is shown all of it" in caplog.text
    assert colourful_rows(tmp_path / "explain.png") >= 1 + 2 * (1 + 4)


def test_mistakes(tiny_cache: Config, config: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no cache in"):
        inspect.inspect(config, 3, tmp_path / "sheet.png")
    with pytest.raises(ProPhyError, match=r"none.mp4 cannot be opened \(No such file"):
        inspect.explain(tiny_cache, str(tmp_path / "none.mp4"), [], tmp_path / "explain.png")
    with pytest.raises(ProPhyError, match="did you mean 'collision'"):
        inspect.explain(tiny_cache, str(tmp_path / "none.mp4"), ["colision"], tmp_path / "explain.png")
    with pytest.raises(ProPhyError, match="cannot write the picture"):
        inspect.inspect(tiny_cache, 1, tmp_path / "sheet.txt")
    shutil.copytree(tiny_cache.cache.output, config.cache.output)
    for path in Path(config.cache.output).glob(f"priors/{ROW_FILES}"):
        damage_every_row(path)
    with pytest.raises(ProPhyError, match="is damaged; run `prophy cache verify`"):
        inspect.inspect(config, 1, tmp_path / "sheet.png")


def damage_every_row(path: Path) -> None:
    """Flips a bit of the maps of each row."""
    content, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    maps = next(n for n in range(metadata.num_columns) if metadata.schema.column(n).path.startswith("maps."))
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(maps)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
