"""Clips for the eye: frames in a row under their captions, with the outlines of masks where there are any."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from prophy.sandbox.clip import SimulatedClip
from prophy.sandbox.dataset import StoredClip
from prophy.sheets import captioned, evenly, stacked

_OUTLINES = ((255, 255, 255), (255, 80, 220))


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
        chosen = evenly(clip.frames, columns, scale)
        for phenomenon, colour in zip(clip.phenomena if outlines else (), _OUTLINES, strict=False):
            chosen[_edge(evenly(clip.masks[phenomenon], columns, scale))] = colour
        rows.append(captioned(f"{clip.caption}  [{', '.join(clip.phenomena)}]", chosen))
    return stacked(rows)


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of `[N, H, W]` masks with a neighbour outside."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~inner
