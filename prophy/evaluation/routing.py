"""Do the experts act where the physics is? Routing of true clips at all noise levels, against their masks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prophy.device import autocast
from prophy.evaluation.localization import discrimination_auroc, localization_auroc
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.sandbox import ClipTruth
from prophy.training.objectives import Objective


@dataclass(frozen=True)
class RoutingScores:
    """How the routers treat clips.

    Attributes:
        where: per phenomenon, AUROC of its map against its mask, of each clip that holds it.
        which: per phenomenon, AUROC of its map at telling its mask from the others', where there are others.
        semantic_weights: per phenomenon, mean rho_s `[E_s]` of the clips that hold it alone.
    """

    where: dict[str, list[float]]
    which: dict[str, list[float]]
    semantic_weights: dict[str, np.ndarray]


@torch.no_grad()
def score_routing(
    transformer: PhysicsTransformer,
    objective: Objective,
    clips: Sequence[ClipTruth],
    latents: torch.Tensor,
    text: Mapping[str, torch.Tensor],
    token_grid: tuple[int, int, int],
) -> RoutingScores:
    """Runs the transformer once on each clip, at quantiles of the timestep that are spread evenly over them.

    Args:
        transformer: with a Physical Branch, whose phenomena are all that the clips show.
        objective: what it was trained on.
        clips: the truth about each clip.
        latents: the clips', `[N, C, T, H, W]`.
        text: their captions, encoded: the family's tensors `[N, ...]`, by name.
        token_grid: the transformer's, `(T', H', W')`.
    """
    where: dict[str, list[float]] = defaultdict(list)
    which: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, list[np.ndarray]] = defaultdict(list)
    names = transformer.physics.phenomena
    generator = torch.Generator().manual_seed(0)
    for index, clip in enumerate(clips):
        timestep = objective.timesteps(torch.tensor([(index + 0.5) / len(clips)]))
        x_0 = latents[index : index + 1].float()
        noisy = objective.add_noise(x_0, torch.randn(x_0.shape, generator=generator), timestep)
        caption = {name: value[index : index + 1].float() for name, value in text.items()}
        with autocast(transformer.device, "bfloat16"):
            routing = transformer.predict(noisy, timestep, caption).routing
        assert routing is not None  # the branch was not skipped, and has both kinds of experts
        assert routing.phenomenon_maps is not None and routing.semantic_weights is not None
        found = routing.phenomenon_maps[0].unflatten(0, token_grid).numpy()
        maps: dict[str, np.ndarray] = {
            phenomenon: found[..., names.index(phenomenon)] for phenomenon in clip.phenomena
        }
        for scores, of_clip in (
            (where, localization_auroc(maps, clip.masks)),
            (which, discrimination_auroc(maps, clip.masks)),
        ):
            for phenomenon, score in of_clip.items():
                scores[phenomenon].append(score)
        if len(clip.phenomena) == 1:
            weights[clip.phenomena[0]].append(routing.semantic_weights[0].numpy())
    return RoutingScores(
        where,
        which,
        {phenomenon: np.mean(weights[phenomenon], 0) for phenomenon in names if phenomenon in weights},
    )
