"""Clips for the eye: frames in a row, the outline of each mask, the caption."""

from collections.abc import Sequence

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
    rows = [_row(clip, columns, scale, outlines) for clip in clips]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(clip: SimulatedClip | StoredClip, columns: int, scale: int, outlines: bool) -> Image.Image:
    frames = clip.frames
    chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    pictures = np.kron(frames[chosen], np.ones((1, scale, scale, 1), np.uint8))
    if outlines:
        for phenomenon, colour in zip(clip.phenomena, _OUTLINES, strict=False):
            pictures[_edge(np.kron(clip.masks[phenomenon][chosen], np.ones((1, scale, scale), bool)))] = (
                colour
            )
    strip = np.concatenate(list(pictures), axis=1)
    row = Image.new("RGB", (strip.shape[1], strip.shape[0] + _CAPTION_HEIGHT))
    row.paste(Image.fromarray(strip), (0, _CAPTION_HEIGHT))
    ImageDraw.Draw(row).text((3, 1), f"{clip.caption}  [{', '.join(clip.phenomena)}]", fill=(255, 255, 255))
    return row


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of `[N, H, W]` masks with a neighbour outside."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~inner
