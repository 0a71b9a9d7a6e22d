"""Does a map point at where the phenomenon is? Maps against the sandbox's exact masks."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from prophy.token_frames import Cells, token_frames

MASK_THRESHOLD = 0.1
"""A cell of the map's grid counts as inside when this share of its pixels is."""


def mask_on_grid(mask: np.ndarray, grid: tuple[int, int, int], cells: Cells) -> np.ndarray:
    """Pools a pixel mask `[T, H, W]` (bool) to the cells of a map's grid: `[t, h, w]` (bool)."""
    pixels = torch.from_numpy(mask).float()
    if cells == "slices":
        return F.adaptive_avg_pool3d(pixels[None], grid)[0].numpy() > MASK_THRESHOLD
    in_time = [pixels[each.start : each.stop].mean(0) for each in token_frames(grid[0], len(mask))]
    return F.adaptive_avg_pool2d(torch.stack(in_time), grid[1:]).numpy() > MASK_THRESHOLD


def localization_auroc(
    maps: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], cells: Cells
) -> dict[str, float]:
    """Area under the ROC curve of each map as a detector of its mask's cells; 0.5 is chance.

    Args:
        maps: per phenomenon `[t, h, w]`, any scale.
        masks: per phenomenon `[T, H, W]`, bool, at pixel resolution.
        cells: what a cell in time is.

    Returns:
        One figure per phenomenon that has a map and a mask with cells both inside and outside.
    """
    scores = {}
    for phenomenon in maps.keys() & masks.keys():
        inside = mask_on_grid(masks[phenomenon], maps[phenomenon].shape, cells)
        if inside.any() and not inside.all():
            scores[phenomenon] = float(roc_auc_score(inside.ravel(), maps[phenomenon].ravel()))
    return scores


def discrimination_auroc(
    maps: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], cells: Cells
) -> dict[str, float]:
    """How well a map tells its own mask's cells from those of the other masks; cells of no mask do not count.

    Args:
        maps: per phenomenon `[t, h, w]`, any scale.
        masks: per phenomenon `[T, H, W]`, bool, at pixel resolution.
        cells: what a cell in time is.

    Returns:
        One figure per phenomenon that has a map, a mask, and others beside it.
    """
    scores = {}
    for phenomenon in maps.keys() & masks.keys():
        grid = maps[phenomenon].shape
        own = mask_on_grid(masks[phenomenon], grid, cells)
        others = [mask_on_grid(mask, grid, cells) for other, mask in masks.items() if other != phenomenon]
        counted = own ^ np.any(others, axis=0) if others else np.zeros(grid, bool)
        if own[counted].any() and not own[counted].all():
            scores[phenomenon] = float(roc_auc_score(own[counted], maps[phenomenon][counted]))
    return scores
