"""Pictures for people: film strips, maps over frames, curves. All return something that HTML can embed."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from prophy.token_frames import Cells, token_centres

PLOTS_PER_ROW = 3
OPACITY = 0.75  # of a map's hottest place; where the page's slider begins


def heat_overlay(frames: np.ndarray, heat: np.ndarray, cells: Cells) -> np.ndarray:
    """Lays a map over frames.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        heat: `[t, h, w]` on any grid.
        cells: what a cell in time is.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    layer = heat_layer(heat, frames.shape[:3], cells)
    opacity = OPACITY / 255 * layer[..., 3:].astype(np.float32)
    return (frames * (1 - opacity) + layer[..., :3] * opacity).astype(np.uint8)


def heat_layer(heat: np.ndarray, grid: Sequence[int], cells: Cells) -> np.ndarray:
    """The colours of a map, resampled to a grid and scaled to its own range; the more heat, the more opaque.

    Args:
        heat: `[t, h, w]`.
        grid: `T, H, W`.
        cells: what a cell in time is.

    Returns:
        RGBA, uint8 `[T, H, W, 4]`.
    """
    low, high = heat.min(), heat.max()
    scaled = ((heat - low) / max(high - low, 1e-12)).astype(np.float32)
    scaled = _at(scaled, 0, _places(len(heat), grid[0], cells))
    for axis in (1, 2):
        scaled = _at(scaled, axis, _places(heat.shape[axis], grid[axis], "slices"))
    layer: np.ndarray = mpl.colormaps["inferno"](scaled, bytes=True)
    layer[..., 3] = (255 * scaled).round()
    return layer


def _places(num_cells: int, size: int, cells: Cells) -> np.ndarray:
    """Where the centres of `size` places are among those of the cells, from 0 to the last cell's."""
    if cells == "tokens":
        return np.interp(np.arange(size), token_centres(num_cells, size), np.arange(num_cells))
    # Old and new cells share the same extent, not their centres.
    return ((np.arange(size) + 0.5) * num_cells / size - 0.5).clip(0, num_cells - 1)


def _at(values: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Values at places between the cells of one axis, by linear interpolation."""
    last = values.shape[axis] - 1
    before = places.astype(int)
    share = np.expand_dims(
        np.float32(places - before), [other for other in range(values.ndim) if other != axis]
    )
    after = np.minimum(before + 1, last)
    return values.take(before, axis) * (1 - share) + values.take(after, axis) * share


def curves(steps: Sequence[float], series: Mapping[str, Sequence[float]]) -> Figure:
    """One small plot per series over the same steps, side by side in rows."""
    num_rows = -(-len(series) // PLOTS_PER_ROW)
    figure = Figure(figsize=(3.2 * PLOTS_PER_ROW, 2.4 * num_rows), layout="constrained")
    for place, (name, values) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(num_rows, PLOTS_PER_ROW, place)
        axes.plot(steps, values, color="#3366aa")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    return figure


def png_uri(picture: np.ndarray | Image.Image | Figure) -> str:
    """A picture as a `data:` URI."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=110)
    else:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mp4_uri(path: Path) -> str:
    """A video file as a `data:` URI."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
