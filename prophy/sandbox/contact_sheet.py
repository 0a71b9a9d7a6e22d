"""Clips for the eye: frames in a row under their captions, with the outlines of masks where there are any."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from prophy.sandbox.clip import SimulatedClip
from prophy.sandbox.dataset import StoredClip

_OUTLINES = ((255, 255, 255), (255, 80, 220))
_CAPTION_HEIGHT = 14


def contact_sheet(
    clips: Sequence[SimulatedClip | StoredClip], columns: int = 9, scale: int = 2, outlines: bool = True
) -> Image.Image:
    """One row per clip.

    Args:
        clips: what to show.
        columns: frames of each clip, evenly spaced from the first to the last.
        scale: by which frames are enlarged.
        outlines: whether masks are outlined, the first phenomenon's white, the second's pink.
    """
    rows = []
    for clip in clips:
        chosen = _evenly(clip.frames, columns, scale)
        for phenomenon, colour in zip(clip.phenomena if outlines else (), _OUTLINES, strict=False):
            chosen[_edge(_evenly(clip.masks[phenomenon], columns, scale))] = colour
        rows.append(_row(f"{clip.caption}  [{', '.join(clip.phenomena)}]", chosen))
    return _stack(rows)


def film_sheet(videos: Mapping[str, np.ndarray], columns: int = 9, scale: int = 2) -> Image.Image:
    """One row per video, given by caption as frames uint8 `[T, H, W, 3]`; otherwise as `contact_sheet`."""
    return _stack([_row(caption, _evenly(frames, columns, scale)) for caption, frames in videos.items()])


def _evenly(frames: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """Some frames `[T, H, W, ...]`, evenly spaced and enlarged."""
    chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
    return chosen.repeat(scale, axis=1).repeat(scale, axis=2)


def _row(caption: str, frames: np.ndarray) -> Image.Image:
    strip = np.concatenate(list(frames), axis=1)
    row = Image.new("RGB", (strip.shape[1], strip.shape[0] + _CAPTION_HEIGHT))
    row.paste(Image.fromarray(strip), (0, _CAPTION_HEIGHT))
    ImageDraw.Draw(row).text((3, 1), caption, fill=(255, 255, 255))
    return row


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of `[N, H, W]` masks with a neighbour outside."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~inner
