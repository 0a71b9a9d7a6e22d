"""The report and its pictures."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prophy.evaluation.pictures import _resample, curves, heat_overlay, png_uri
from prophy.evaluation.report import Picture, Section, Table, write_report


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_overlay_lights_up_the_hot_cell_only() -> None:
    heat = np.zeros((2, 4, 4))
    heat[:, 0, 0] = 1.0
    frames = np.full((4, 32, 32, 3), 60, np.uint8)
    overlaid = heat_overlay(frames, heat)
    assert overlaid.shape == frames.shape
    assert (overlaid[:, 2, 2] != 60).any()
    np.testing.assert_array_equal(overlaid[:, 24:, 24:], 60)


def test_maps_are_resampled_as_torch_interpolates() -> None:
    heat, fine = np.random.default_rng(0).random((4, 1, 9), dtype=np.float32), (13, 3, 6)
    ours = heat
    for axis, size in enumerate(fine):
        ours = _resample(ours, axis, size)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(heat)[None, None], fine, mode="trilinear")
    np.testing.assert_allclose(ours, theirs[0, 0], atol=1e-6)


def test_report_is_self_contained_and_escapes(tmp_path: Path) -> None:
    picture = Picture(uri=png_uri(curves([1, 2], {"loss": [2.0, 1.0], "lr": [0.1, 0.1]})), caption="<losses>")
    table = Table(header=["a"], rows=[["b & c"]])
    write_report(
        tmp_path / "r.html", "Title", [Section(title="S", text="T", pictures=[picture], table=table)]
    )
    html = (tmp_path / "r.html").read_text()
    assert "&lt;losses&gt;" in html and "b &amp; c" in html
    assert "http" not in html
    assert decode(picture.uri).width > 300
