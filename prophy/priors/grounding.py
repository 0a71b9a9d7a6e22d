"""From raw attention maps to the targets of the token alignment loss: recipes, resampling, scaling, mask.

Knows no model: it works on one row of the priors table, at load, so that another recipe never reruns the VLM.
Equations: prophy/METHOD.md, section 4, steps 3 and 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from prophy.errors import ProPhyError
from prophy.priors.recipes import SUBTRACTIONS, Negatives
from prophy.token_frames import token_centres

_SATURATED = 0.2
"""Share of a map's positive cells whose target is 1.

Attention has few cells far above the rest: divided by its maximum, a map is near 0 almost everywhere, and a
constant 0 nearly solves Eq. 5, whose optimum is a median.
"""


@dataclass(frozen=True)
class Recipe:
    """How raw maps become signed ones, in this order; positive is 'here'.

    Attributes:
        subtract: raw maps `[K + 1, T, H, W]`, the background's last, to signed maps `[K, T, H, W]`.
        blur: whether each cell first becomes the mean over the 3x3x3 cells around it,
            in time and space.
        by_motion: whether the result is multiplied by how much the latents move there: the VLM names, motion
            delimits. For a still camera.
    """

    subtract: Callable[[torch.Tensor], torch.Tensor]
    blur: bool
    by_motion: bool

    def __call__(
        self,
        maps: torch.Tensor,
        latents: torch.Tensor,
        grid: tuple[int, int, int],
        num_frames: int,
        slices: torch.Tensor,
    ) -> torch.Tensor:
        """Signed maps `[K, T', H', W']`; the arguments are those of `make_targets`."""
        signed = resample(self.subtract(_blur(maps) if self.blur else maps), grid, num_frames, slices)
        return signed * motion(latents, grid) if self.by_motion else signed


def _none(maps: torch.Tensor) -> torch.Tensor:
    return maps[:-1]


def _minus_background(maps: torch.Tensor) -> torch.Tensor:
    return maps[:-1] - maps[-1]


def _minus_mean(maps: torch.Tensor) -> torch.Tensor:
    return maps[:-1] - maps.mean(0)


def _minus_others(maps: torch.Tensor) -> torch.Tensor:
    phenomena = maps[:-1]
    if len(phenomena) < 2:
        return phenomena
    return phenomena - (phenomena.sum(0) - phenomena) / (len(phenomena) - 1)


def _blur(maps: torch.Tensor) -> torch.Tensor:
    """Mean over the 3x3x3 cells around each cell, in time and space, of those that exist."""

    def total(values: torch.Tensor) -> torch.Tensor:
        # Padded here: the pool's own padding refuses maps of fewer than 3 cells in one direction.
        return F.avg_pool3d(F.pad(values, (1,) * 6), 3, stride=1, divisor_override=1)

    return total(maps) / total(torch.ones_like(maps))


_SUBTRACTIONS = {
    "none": _none,
    "minus_background": _minus_background,
    # The mean is that of all maps of the clip, the background's included.
    "minus_mean": _minus_mean,
    "minus_others": _minus_others,
}

RECIPES: dict[str, Recipe] = {
    name + "_blur" * blur + "_motion" * by_motion: Recipe(_SUBTRACTIONS[name], blur, by_motion)
    for by_motion, blur, name in product((False, True), (False, True), SUBTRACTIONS)
}
"""By name, see `recipes`."""


def motion(latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """How far latents `[C, T, H, W]` are from their median over time, mean over channels: `[T', H', W']`."""
    moved = (latents - latents.median(dim=1, keepdim=True).values).abs().mean(0)
    return F.adaptive_avg_pool3d(moved[None], grid)[0]


def resample(
    maps: torch.Tensor, grid: tuple[int, int, int], num_frames: int, slices: torch.Tensor
) -> torch.Tensor:
    """Maps on the transformer's token grid: bilinear in space (averaging where it shrinks), linear in time.

    The video model sees frames evenly spaced over the clip, its first and last included. Tokens hold the
    frames that `token_frames` says; slices and tokens are compared by their middles.

    Args:
        maps: `[K, T, H, W]`, K at least 1.
        grid: `(T', H', W')`.
        num_frames: frames that the video model sees, `1 + c (T' - 1)`.
        slices: see `make_targets`.

    Returns:
        `[K, T', H', W']`.
    """
    frames = torch.tensor(token_centres(grid[0], num_frames), dtype=torch.float64)
    weights = _interpolation(frames / max(num_frames - 1, 1), slices.mean(1)).to(maps.dtype)
    in_time = torch.einsum("js,kshw->kjhw", weights, maps)
    return F.interpolate(in_time, size=grid[1:], mode="bilinear", antialias=True)


def _interpolation(times: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Weights `[T', S]` of values at `centres` `[S]`, ascending, that interpolate linearly at `times` `[T']`.

    Before the first centre and after the last, the nearest value holds.
    """
    after = torch.searchsorted(centres, times).clamp(1, max(len(centres) - 1, 1))
    weights = torch.zeros(len(times), len(centres), dtype=torch.float64)
    if len(centres) == 1:
        return weights + 1
    before = after - 1
    share = ((times - centres[before]) / (centres[after] - centres[before])).clamp(0, 1)
    rows = torch.arange(len(times))
    weights[rows, before], weights[rows, after] = 1 - share, share
    return weights


def make_targets(
    maps: torch.Tensor,
    map_phenomena: Sequence[int],
    latents: torch.Tensor,
    *,
    grid: tuple[int, int, int],
    num_frames: int,
    slices: torch.Tensor,
    num_phenomena: int,
    recipe: str,
    negatives: Negatives = "ignore",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets `Q_r` and mask `M` of Eq. 5 for one clip.

    Each phenomenon's map (by the recipe, on the token grid) keeps its positive part, scaled so that its
    highest fifth is 1. `M` is true where that map is positive; with `negatives="zero"` also where it is not,
    with target 0. It is false for phenomena without a map, unless `negatives="all"` says by it that they are
    nowhere, and for a map without any positive cell: that says nothing about where.

    Args:
        maps: raw maps `[K + 1, T, H, W]` on the VLM's grid, the background's last.
        map_phenomena: taxonomy indices of the first K maps.
        latents: the clip's, `[C, T, H, W]`.
        grid: tokens of the video model, `(T', H', W')`.
        num_frames: frames that the video model sees, `1 + c (T' - 1)`.
        slices: `[T, 2]`, float64: when the first and the last frame of each slice of the maps are, as parts
            of the clip from its first frame (0) to its last (1).
        num_phenomena: phenomena of the taxonomy.
        recipe: a key of `RECIPES`.
        negatives: what cells outside the positive part say, see `Negatives`.

    Returns:
        `Q_r [N, num_phenomena]` float32 in [0, 1], and `M [N, num_phenomena]` bool; `N = T' H' W'`, t
        slowest.

    Raises:
        ProPhyError: there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ProPhyError(
            f"no recipe {recipe!r} for targets; set train.recipe to one of: {', '.join(RECIPES)}"
        )
    num_tokens = grid[0] * grid[1] * grid[2]
    targets = torch.zeros(num_tokens, num_phenomena)
    mask = torch.full((num_tokens, num_phenomena), negatives == "all")
    if map_phenomena:
        signed = RECIPES[recipe](maps, latents, grid, num_frames, slices).flatten(1).T
        positive = signed > 0
        saturated = signed.where(positive, torch.nan).nanquantile(1 - _SATURATED, dim=0)
        targets[:, map_phenomena] = (signed / saturated).clamp(0, 1).nan_to_num()
        mask[:, map_phenomena] = positive if negatives == "ignore" else positive.any(0).expand_as(positive)
    return targets, mask
