"""Videos on one picture: some frames of each in a row, rows under each other."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

_CAPTION_HEIGHT = 14


def evenly(frames: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Some frames of `[T, H, W, ...]`, evenly spaced from the first to the last, enlarged by `scale`."""
    chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
    return chosen.repeat(scale, axis=1).repeat(scale, axis=2)


def side_by_side(frames: np.ndarray) -> np.ndarray:
    """Frames `[N, H, W, ...]` as one of `[H, N * W, ...]`."""
    return np.concatenate(list(frames), axis=1)


def captioned(caption: str, frames: np.ndarray) -> Image.Image:
    """Frames, uint8 `[N, H, W, 3]`, side by side under a line of text."""
    strip = side_by_side(frames)
    row = Image.new("RGB", (strip.shape[1], strip.shape[0] + _CAPTION_HEIGHT))
    row.paste(Image.fromarray(strip), (0, _CAPTION_HEIGHT))
    ImageDraw.Draw(row).text((3, 1), caption, fill=(255, 255, 255))
    return row


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other, on black."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def film_sheet(videos: Iterable[tuple[str, np.ndarray]], columns: int = 9, scale: int = 2) -> Image.Image:
    """One row per video under its caption.

    Args:
        videos: the caption of each, and its frames, uint8 `[T, H, W, 3]`.
        columns: how many frames of each are shown.
        scale: factor by which they are enlarged.
    """
    return stacked([captioned(caption, evenly(frames, columns, scale)) for caption, frames in videos])
