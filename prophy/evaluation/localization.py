"""Does a map point at where the phenomenon is? Maps against the sandbox's exact masks."""

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from prophy.taxonomy import Phenomenon

MASK_THRESHOLD = 0.1
"""A cell of the map's grid counts as inside when this share of its pixels is."""


def mask_on_grid(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Pools a pixel mask `[T, H, W]` (bool) to the cells of a map's grid: `[t, h, w]` (bool)."""
    pixels = torch.from_numpy(mask).float()[None, None]
    return torch.nn.functional.adaptive_avg_pool3d(pixels, grid)[0, 0].numpy() > MASK_THRESHOLD


def localization_auroc(
    maps: Mapping[Phenomenon, np.ndarray], masks: Mapping[Phenomenon, np.ndarray]
) -> dict[Phenomenon, float]:
    """Area under the ROC curve of each map as a detector of its mask's cells; 0.5 is chance.

    Args:
        maps: per phenomenon `[t, h, w]`, any scale.
        masks: per phenomenon `[T, H, W]`, bool, at pixel resolution.

    Returns:
        One figure per phenomenon that has a map and a mask with cells both inside and outside.
    """
    scores = {}
    for phenomenon in maps.keys() & masks.keys():
        inside = mask_on_grid(masks[phenomenon], maps[phenomenon].shape)
        if inside.any() and not inside.all():
            scores[phenomenon] = float(roc_auc_score(inside.ravel(), maps[phenomenon].ravel()))
    return scores
