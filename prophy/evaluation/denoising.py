"""How well a transformer denoises true clips: what tells models apart without a video being made.

Right and wrong captions or clips get the same noise, and so do all models: what differs is what is asked.
LikePhys (arXiv 2510.11512) measures physics this way.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from prophy.device import autocast
from prophy.models.control import PhysicsControl, RoutingOutput
from prophy.models.physics_config import BranchConfig
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.training.objectives import Objective


@dataclass(frozen=True)
class Question:
    """A clip and a caption to denoise it by.

    Attributes:
        latents: `[C, T, H, W]`.
        text: the caption, encoded: the family's tensors, by name.
        level: share of noise, above 0; 1 is noise alone.
        noise_of: names the noise; the same name is the same noise.
    """

    latents: torch.Tensor
    text: Mapping[str, torch.Tensor]
    level: float
    noise_of: str


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        error: mean squared error of each token, `[T', H', W']`, float32.
        routing: what the routers said, of this clip alone; None without a branch.
    """

    error: torch.Tensor
    routing: RoutingOutput | None


class Denoiser:
    """A transformer that answers questions in batches.

    Args:
        transformer: one of any family, in evaluation mode.
        objective: what it was trained on.
        physics: knobs of its branch.
        autocast_to: precision of forward passes, if not that of the weights.
        batch_size: clips at once.
    """

    def __init__(
        self,
        transformer: PhysicsTransformer,
        objective: Objective,
        physics: PhysicsControl,
        autocast_to: str | None,
        batch_size: int,
    ) -> None:
        self.transformer = transformer
        self._objective, self._physics = objective, physics
        self._autocast, self._batch_size = autocast_to, batch_size

    def answer(self, questions: Sequence[Question], grid: tuple[int, int, int]) -> Iterator[Answer]:
        """The answers, in the order of the questions; clips of one shape that follow each other are a batch.

        Args:
            questions: any number.
            grid: the transformer's tokens `(T', H', W')`.
        """
        for _, of_one_shape in groupby(questions, key=lambda question: question.latents.shape):
            alike = list(of_one_shape)
            for start in range(0, len(alike), self._batch_size):
                yield from self._answer(alike[start : start + self._batch_size], grid)

    @torch.no_grad()
    def _answer(self, questions: Sequence[Question], grid: tuple[int, int, int]) -> Iterator[Answer]:
        transformer, objective = self.transformer, self._objective
        device, dtype = transformer.device, transformer.dtype
        latents = torch.stack([question.latents.float() for question in questions])
        noise = torch.stack([noise_like(question.latents, question.noise_of) for question in questions])
        timesteps = objective.timesteps_at(torch.tensor([question.level for question in questions]))
        noisy = objective.add_noise(latents, noise, timesteps)
        text = {
            name: torch.stack([question.text[name] for question in questions]).to(device, dtype)
            for name in questions[0].text
        }
        with autocast(device, self._autocast):
            output = transformer.predict(noisy.to(device, dtype), timesteps.to(device), text, self._physics)
        errors = (output.sample.float().cpu() - objective.target(latents, noise, timesteps)) ** 2
        tokens = F.adaptive_avg_pool3d(errors.mean(1), grid)
        for index, error in enumerate(tokens):
            yield Answer(error, None if output.routing is None else _of(output.routing, index))


def noise_like(latents: torch.Tensor, name: str) -> torch.Tensor:
    """The noise of a name: the same on every machine, float32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed % 2**63))


def bare_branch(phenomena: Sequence[str], latent_shape: Sequence[int]) -> dict[str, object]:
    """A branch with nothing in it, for a backbone that has none: it answers questions as it is.

    Args:
        phenomena: any names.
        latent_shape: `(T, H, W)`.
    """
    return BranchConfig(
        physics_layers=[0],
        physical_blocks=False,
        num_semantic_experts=0,
        num_refinement_experts=0,
        latent_shape=[*latent_shape],
        phenomena=[*phenomena],
    ).model_dump()


def _of(routing: RoutingOutput, index: int) -> RoutingOutput:
    """The routing of one clip of a batch, on the CPU."""
    return RoutingOutput(
        **{
            name: value[index : index + 1].float().cpu()
            for name, value in routing.items()
            if value is not None
        }
    )
