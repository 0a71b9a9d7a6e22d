from typing import Any

import numpy as np
import torch

from prophy.evaluation.localization import mask_on_grid
from prophy.evaluation.routing import score_routing
from prophy.models.control import RoutingOutput
from prophy.models.physics_config import BranchConfig
from prophy.sandbox import SimulatedClip, simulate_clip
from prophy.training.objectives import FlowMatching
from tests.wisa import PHENOMENA

GRID = (5, 8, 8)


class Oracle(torch.nn.Module):
    """Routes each clip as its masks say; the semantic weights name its first phenomenon."""

    device = torch.device("cpu")
    physics = BranchConfig(physics_layers=[0], latent_shape=[5, 16, 16], phenomena=[*PHENOMENA])

    def __init__(self, clips: list[SimulatedClip]) -> None:
        super().__init__()
        self.clips = clips

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: dict[str, torch.Tensor]) -> Any:
        clip = self.clips[int(text["prompt_embeds"])]
        maps = torch.zeros(1, 320, len(PHENOMENA))
        for phenomenon, mask in clip.masks.items():
            maps[0, :, PHENOMENA.index(phenomenon)] = torch.from_numpy(
                mask_on_grid(mask, GRID).ravel()
            ).float()
        weights = torch.nn.functional.one_hot(
            torch.tensor([PHENOMENA.index(clip.phenomena[0])]), len(PHENOMENA)
        ).float()
        routing = RoutingOutput(semantic_weights=weights, refinement_logits=maps, phenomenon_maps=maps)
        return type("Output", (), {"routing": routing})


def test_a_router_that_knows_the_masks_scores_one() -> None:
    clips = [simulate_clip(seed, num_frames=17, fps=8.0, size=64) for seed in range(12)]
    latents, text = torch.zeros(12, 16, 5, 16, 16), {"prompt_embeds": torch.arange(12.0)}
    oracle: Any = Oracle(clips)
    scores = score_routing(oracle, FlowMatching(3.0), clips, latents, text, GRID)
    assert {value for values in scores.where.values() for value in values} == {1.0}
    assert {value for values in scores.which.values() for value in values} == {1.0}
    assert {p for clip in clips for p in clip.phenomena} >= scores.where.keys()
    for phenomenon, weights in scores.semantic_weights.items():
        assert np.argmax(weights) == PHENOMENA.index(phenomenon) and weights.sum() == 1
