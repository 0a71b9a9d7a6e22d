"""Pictures for people: film strips, maps over frames, curves. All return something that HTML can embed."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

PLOTS_PER_ROW = 3


def heat_overlay(frames: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a map over frames; the more heat, the more opaque.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        heat: `[t, h, w]` on any grid; resampled to the frames and scaled to its own range.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    resampled = heat.astype(np.float32)
    for axis, size in enumerate(frames.shape[:3]):
        resampled = _resample(resampled, axis, size)
    low, high = resampled.min(), resampled.max()
    scaled = (resampled - low) / max(high - low, 1e-12)
    opacity = 0.75 * scaled[..., None]
    colours = mpl.colormaps["inferno"](scaled)[..., :3] * 255
    return (frames * (1 - opacity) + colours * opacity).astype(np.uint8)


def _resample(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along one axis; old and new cells share the same extent, not their centres."""
    last = values.shape[axis] - 1
    places = ((np.arange(size) + 0.5) * (last + 1) / size - 0.5).clip(0, last)
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
