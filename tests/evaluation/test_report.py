"""The report and its pictures."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prophy.evaluation.pictures import _at, _places, curves, heat_layer, heat_overlay, png_uri
from prophy.evaluation.report import Picture, Section, Table, write_report
from prophy.evaluation.sections import routing_section
from prophy.models.control import PhysicsTrace, RoutingOutput


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_overlay_lights_up_the_hot_cell_only() -> None:
    heat = np.zeros((2, 4, 4))
    heat[:, 0, 0] = 1.0
    frames = np.full((4, 32, 32, 3), 60, np.uint8)
    overlaid = heat_overlay(frames, heat, "slices")
    assert overlaid.shape == frames.shape
    assert (overlaid[:, 2, 2] != 60).any()
    np.testing.assert_array_equal(overlaid[:, 24:, 24:], 60)


def test_a_layer_is_as_opaque_as_its_map_is_hot() -> None:
    heat = np.array([[[0.2, 0.4], [0.3, 0.2]], [[0.6, 0.2], [0.3, 0.2]]], np.float32)
    layer = heat_layer(heat, heat.shape, "tokens")
    assert layer.shape == (2, 2, 2, 4)
    np.testing.assert_allclose(layer[..., 3], 255 * (heat - 0.2) / 0.4, atol=0.6)
    brightness = layer[..., :3].sum(-1).ravel()[heat.ravel().argsort()]
    assert (np.diff(brightness) >= 0).all(), "hotter is brighter"


@pytest.mark.parametrize(("num_tokens", "num_frames"), [(5, 17), (21, 81), (11, 81), (1, 1)])
def test_a_token_is_hottest_on_its_own_frames(num_tokens: int, num_frames: int) -> None:
    """The first token holds frame 0 alone, each other the next 4, or 8 of CogVideoX 1.5."""
    each = (num_frames - 1) // max(num_tokens - 1, 1)
    for token in range(num_tokens):
        heat = np.zeros((num_tokens, 1, 2))
        heat[token, 0, 0] = 1.0
        opacity = heat_layer(heat, (num_frames, 1, 2), "tokens")[:, 0, 0, 3].astype(float)
        own = [0] if token == 0 else list(range(each * (token - 1) + 1, each * token + 1))
        hottest = np.flatnonzero(opacity == opacity.max())
        assert set(hottest) <= set(own)
        assert 0 < token < num_tokens - 1 or set(hottest) & {0, num_frames - 1}
        if 1 < token < num_tokens - 1:
            assert np.average(np.arange(num_frames), weights=opacity) == pytest.approx(np.mean(own), abs=0.1)


def test_a_map_that_is_the_same_everywhere_is_no_heat() -> None:
    assert not heat_layer(np.full((1, 2, 2), 0.5), (3, 4, 4), "slices")[..., 3].any()


def test_the_routing_shows_what_the_prompt_names() -> None:
    trace = PhysicsTrace()
    maps = torch.tensor([0.1, 0.9]).expand(1, 4, 2) * torch.linspace(0.5, 1, 4)[:, None]
    routing = RoutingOutput(semantic_weights=torch.tensor([[0.25, 0.75]]), phenomenon_maps=maps)
    trace.record(1.0, routing, (1, 2, 2), ("collision", "melting"))
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    named = routing_section("a ball bounces", frames, trace, ["collision"])
    assert [picture.caption for picture in named.pictures] == ["collision: mean 0.08, from 0.05 to 0.10"]
    nothing = routing_section("a cat", frames, trace, [])
    assert not nothing.pictures and "the prompt names no phenomenon" in nothing.text


def test_maps_are_resampled_as_torch_interpolates() -> None:
    heat, fine = np.random.default_rng(0).random((4, 1, 9), dtype=np.float32), (13, 3, 6)
    ours = heat
    for axis, size in enumerate(fine):
        ours = _at(ours, axis, _places(heat.shape[axis], size, "slices"))
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
