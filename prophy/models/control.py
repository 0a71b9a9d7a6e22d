"""Physics knobs of one request, and the trace that collects what the routers said during it.

Both belong to the request and travel as `attention_kwargs={"physics": PhysicsControl(...)}`: the model keeps
no state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.utils import BaseOutput
from torch.utils.weak import WeakIdKeyDictionary

from prophy.taxonomy import index_of


@dataclass
class RoutingOutput(BaseOutput):
    """What the routers said in one forward pass; all float32. None for experts that the branch lacks.

    Attributes:
        semantic_weights: rho_s `[B, E_s]`, rows sum to 1.
        refinement_logits: `[B, N, E_r]`; their softmax is rho_r.
        phenomenon_maps: P' `[B, N, num_phenomena]` in (0, 1): where each phenomenon acts.
    """

    semantic_weights: torch.Tensor | None = None
    refinement_logits: torch.Tensor | None = None
    phenomenon_maps: torch.Tensor | None = None


class PhysicsTrace:
    """Means over the denoising steps of one request, on the CPU; of the conditional passes only.

    Attributes:
        num_videos: B, where a forward pass holds their unguided twins before them; None where it never does.
        num_passes: conditional passes seen.
        semantic_weights: `[B, E_s]`.
        phenomenon_maps: `[B, T', H', W', num_phenomena]` on the transformer's token grid.
        phenomena: the branch's names of the maps, in their order.
    """

    def __init__(self) -> None:
        self.num_videos: int | None = None
        self.num_passes = 0
        self.semantic_weights: torch.Tensor | None = None
        self.phenomenon_maps: torch.Tensor | None = None
        self.phenomena: tuple[str, ...] = ()
        self._timestep: float | None = None

    def record(
        self,
        timestep: float,
        routing: RoutingOutput,
        token_grid: tuple[int, int, int],
        phenomena: Sequence[str],
    ) -> None:
        """Adds a forward pass. The first at a timestep is the prompt's; a second one there is guidance."""
        if timestep == self._timestep:
            return
        self._timestep = timestep
        self.phenomena = tuple(phenomena)
        self.num_passes += 1
        guided = slice(None) if self.num_videos is None else slice(-self.num_videos, None)
        assert routing.semantic_weights is not None and routing.phenomenon_maps is not None
        self.semantic_weights = self._mean(self.semantic_weights, routing.semantic_weights[guided])
        maps = routing.phenomenon_maps[guided].unflatten(1, token_grid)
        self.phenomenon_maps = self._mean(self.phenomenon_maps, maps)

    def _mean(self, mean: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        value = value.detach().float().cpu()
        return value if mean is None else mean.lerp(value, 1 / self.num_passes)


@dataclass(frozen=True)
class PhysicsControl:
    """How strongly the Physical Branch acts in one request.

    Attributes:
        scale: factor on everything that the branch injects; 0 skips the branch.
        strength: factor per phenomenon of the branch, by name, on what the refinement experts inject; 1 where
            not given. At token n it is multiplied by sum_p w[n, p] strength[p], w = the phenomenon maps
            normalised over p.
        invert_refinement: routes by the negated logits of the refinement router.
        trace: collects the routing, if given.
        mixtures: keeps what semantic experts made of each text, by its tensor, if given: their weights and
            the text must not change meanwhile. A pipeline gives a new one to each call.
    """

    scale: float = 1.0
    strength: Mapping[str, float] = field(default_factory=dict)
    invert_refinement: bool = False
    trace: PhysicsTrace | None = None
    mixtures: WeakIdKeyDictionary | None = None

    def token_gain(self, phenomenon_maps: torch.Tensor, phenomena: Sequence[str]) -> torch.Tensor:
        """Factor `[B, N, 1]` on each token's refinement; 1 at strength 1.

        Args:
            phenomenon_maps: `[B, N, num_phenomena]`.
            phenomena: their names, in the order of the maps.

        Raises:
            ProPhyError: a strength is of none of them.
        """
        excess = phenomenon_maps.new_zeros(phenomenon_maps.shape[-1])
        for phenomenon, strength in self.strength.items():
            excess[index_of(phenomenon, phenomena)] = strength - 1.0
        weights = phenomenon_maps / phenomenon_maps.sum(dim=-1, keepdim=True)
        return 1.0 + (weights * excess).sum(dim=-1, keepdim=True)
