"""From the cache to training batches: which samples make up a step, and what a step draws by chance.

Nothing here depends on the number of workers, on the engine, or on earlier steps: a restart needs
only the number of the step. It does not know Ray, DeepSpeed or the model.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, default_collate

from prophy.errors import ProPhyError
from prophy.priors.grounding import make_targets
from prophy.priors.recipes import Negatives
from prophy.training.cache import PriorCache, Shape


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch: `B` samples of one shape, `N` tokens in the order of the transformer's grid.

    Attributes:
        sample_ids: `B` keys of the cache.
        latents: `[B, C, T, H, W]`, normalised as the backbone's pipeline has them.
        text: the true captions, encoded: tensors `[B, ...]`, by the backbone's family's names for them; and
            those of the first frame, where the backbone always takes an image.
        drop_caption: `[B]`, bool: the diffusion loss sees the empty prompt (classifier-free guidance).
        phenomena: `[B, num_phenomena]`, label vectors `q_s`.
        target_maps: `[B, N, num_phenomena]`, the targets `Q_r` of Eq. 5.
        target_mask: `[B, N, num_phenomena]`, bool: the mask `M` of Eq. 5.
        noise: like `latents`, standard normal.
        timestep_quantile: `[B]` in (0, 1), mapped to a timestep by the objective.
        given: `[B]`, bool: the first latent frame is an image's, without noise and without a loss.
    """

    sample_ids: list[str]
    latents: torch.Tensor
    text: dict[str, torch.Tensor]
    drop_caption: torch.Tensor
    phenomena: torch.Tensor
    target_maps: torch.Tensor
    target_mask: torch.Tensor
    noise: torch.Tensor
    timestep_quantile: torch.Tensor
    given: torch.Tensor

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on `device`."""
        moved: dict[str, Any] = {"text": _text_to(self.text, device)}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class SemanticBatch:
    """Captions and labels of one rank's whole accumulation step, for Eq. 3 over the global batch.

    Attributes:
        text: as in `TrainBatch`, `[M, ...]`; `M` = micro-batch size times accumulation steps.
        phenomena: `[M, num_phenomena]`, label vectors `q_s`.
    """

    text: dict[str, torch.Tensor]
    phenomena: torch.Tensor

    @classmethod
    def join(cls, parts: "Sequence[TrainBatch | SemanticBatch]") -> "SemanticBatch":
        """The captions and labels of all parts."""
        return cls(
            {name: torch.cat([part.text[name] for part in parts]) for name in parts[0].text},
            torch.cat([part.phenomena for part in parts]),
        )

    def to(self, device: torch.device) -> "SemanticBatch":
        """The same batch on `device`."""
        return SemanticBatch(_text_to(self.text, device), self.phenomena.to(device))


def _text_to(text: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in text.items()}


class BatchPlan:
    """Which samples make up the global batch of a step: a pure function of the step.

    Every latent shape has an endless stream of its own samples: epoch after epoch, each in an order of its
    own, so that none is dropped and none padded. All samples of a step have one shape; over a cycle of steps
    each shape comes as often as it has samples. Where a shape has fewer samples than a batch holds, a batch
    holds them several times. The number of workers plays no part.

    Args:
        samples: ids by the shape of the latents, each in order (`PriorCache.by_shape`).
        batch_size: samples in a global batch.
        seed: decides all orders.

    Raises:
        ProPhyError: there are fewer samples than a batch holds.
    """

    def __init__(self, samples: Mapping[Shape, pa.Array], batch_size: int, seed: int) -> None:
        if (number := sum(map(len, samples.values()))) < batch_size:
            raise ProPhyError(
                f"the cache holds {number} samples, fewer than the global batch of {batch_size}; "
                f"cache more videos, or lower train.global_batch_size"
            )
        self.batch_size = batch_size
        self._seed = seed
        self._groups = sorted(samples.items())
        counts = np.array([len(ids) for _, ids in self._groups])
        self._steps_per_cycle = counts // np.gcd.reduce(counts)  # of each shape

    def __call__(self, step: int) -> list[str]:
        """The sample ids of the global batch of `step`, counted from 0, in the order that ranks share out."""
        cycle, place = divmod(step, int(self._steps_per_cycle.sum()))
        turns = np.repeat(np.arange(len(self._groups)), self._steps_per_cycle)
        np.random.default_rng(_seed(self._seed, "shapes", cycle)).shuffle(turns)
        turn = turns[place]
        batch = cycle * self._steps_per_cycle[turn] + np.count_nonzero(turns[:place] == turn)

        shape, ids = self._groups[turn]
        epochs, places = np.divmod(batch * self.batch_size + np.arange(self.batch_size), len(ids))
        orders = {
            epoch: np.random.default_rng(_seed(self._seed, shape, epoch)).permutation(len(ids))
            for epoch in set(epochs.tolist())
        }
        drawn = [orders[epoch][place] for epoch, place in zip(epochs.tolist(), places, strict=True)]
        return ids.take(pa.array(drawn)).to_pylist()


@dataclass(frozen=True)
class ClipShape:
    """One shape of clip that a backbone is trained on.

    Attributes:
        num_frames: pixel frames.
        latents: `(C, T, H, W)`.
        token_grid: `(T', H', W')`.
    """

    num_frames: int
    latents: Shape
    token_grid: tuple[int, int, int]


class PriorDataset(Dataset[tuple[list[TrainBatch], SemanticBatch]]):
    """The share of one rank in each step: item `step` is the micro-batches of that step and their captions.

    Noise, timestep and caption dropout are functions of the seed, the step and the place in its global batch.

    Args:
        cache: the samples.
        plan: which samples make up a step.
        clip_shapes: every shape of clip that may occur.
        micro_batch_size: samples in a micro-batch; times `world_size` it divides the plan's batch.
        rank: this worker's, among those that have samples of their own.
        world_size: number of these.
        recipe: how maps become targets (`prophy.priors.grounding.RECIPES`).
        negatives: what cells without the phenomenon say (`make_targets`).
        caption_dropout: share of captions that are replaced by the empty prompt.
        image_share: share of samples whose first latent frame is given.
        seed: decides noise, timesteps and dropout.

    Raises:
        ProPhyError: the cache holds latents of a shape that is not listed.
    """

    def __init__(
        self,
        cache: PriorCache,
        plan: BatchPlan,
        clip_shapes: Iterable[ClipShape],
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        recipe: str,
        negatives: Negatives,
        caption_dropout: float,
        image_share: float,
        seed: int,
    ) -> None:
        self._cache = cache
        self._plan = plan
        self._clip_shapes = {shape.latents: shape for shape in clip_shapes}
        if set(cache.shapes) - self._clip_shapes.keys():
            first = {ids[0].as_py(): shape for shape, ids in cache.by_shape(cache.sample_ids).items()}
            sample_id = min(key for key, shape in first.items() if shape not in self._clip_shapes)
            raise ProPhyError(
                f"the cached latents of {sample_id} have shape {first[sample_id]}, the configured backbone "
                f"makes {' or '.join(map(str, self._clip_shapes))}; run `prophy cache` with this "
                f"configuration"
            )
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._stride = micro_batch_size * world_size
        self._make_targets = partial(make_targets, recipe=recipe, negatives=negatives)
        self._caption_dropout, self._image_share = caption_dropout, image_share
        self._seed = seed

    def __getitem__(self, step: int) -> tuple[list[TrainBatch], SemanticBatch]:
        """The micro-batches of this rank in `step`, and all their captions."""
        sample_ids = self._plan(step)
        first = range(self._rank * self._micro_batch_size, self._plan.batch_size, self._stride)
        batches = [
            self._batch(step, start, sample_ids[start : start + self._micro_batch_size]) for start in first
        ]
        return batches, SemanticBatch.join(batches)

    def _batch(self, step: int, first: int, sample_ids: list[str]) -> TrainBatch:
        rows = [self._row(step, place, sample_id) for place, sample_id in enumerate(sample_ids, start=first)]
        return TrainBatch(sample_ids, **default_collate(rows))

    def _row(self, step: int, place: int, sample_id: str) -> dict[str, Any]:
        sample = self._cache.read(sample_id)
        shape = self._clip_shapes[tuple(sample.latents.shape)]
        targets, mask = self._make_targets(
            sample.maps,
            sample.map_phenomena,
            sample.latents,
            grid=shape.token_grid,
            num_frames=shape.num_frames,
            slices=sample.slices,
            num_phenomena=len(sample.phenomena),
        )
        generator = torch.Generator().manual_seed(_seed(self._seed, step, place))
        return {
            "latents": sample.latents,
            "text": sample.text,
            "drop_caption": torch.rand((), generator=generator) < self._caption_dropout,
            "phenomena": sample.phenomena,
            "target_maps": targets,
            "target_mask": mask,
            "noise": torch.randn(shape.latents, generator=generator),
            "timestep_quantile": torch.rand((), generator=generator).clamp(min=1e-7),
            # Of a single latent frame nothing would be left to predict.
            "given": (torch.rand((), generator=generator) < self._image_share) & (shape.latents[1] > 1),
        }


def _seed(*parts: object) -> int:
    """A seed of 64 bits for what `parts` name."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])
