"""From the cache to training batches: which samples make up a step, and everything that a step draws by chance.

Nothing here depends on the number of workers, on the engine, or on what happened in earlier steps: a restart needs
only the number of the step. It does not know Ray, DeepSpeed or the model.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch. `B` samples of one shape; `N` tokens in the order of the transformer's grid, time slowest.

    Attributes:
        sample_ids: `B` keys of the cache.
        latents: `[B, C, T, H, W]`, normalised as the backbone's pipeline has them.
        encoder_hidden_states: `[B, L, D]`, embeddings of the true captions.
        drop_caption: `[B]`, bool: the diffusion loss sees the empty prompt instead (classifier-free guidance).
        phenomena: `[B, 17]`, label vectors `q_s`.
        target_maps: `[B, N, 17]`, the targets `Q_r` of Eq. 5.
        target_mask: `[B, N, 17]`, bool: the mask `M` of Eq. 5.
        noise: like `latents`, standard normal.
        timestep_quantile: `[B]` in (0, 1), mapped to a timestep by the objective.
    """

    sample_ids: list[str]
    latents: torch.Tensor
    encoder_hidden_states: torch.Tensor
    drop_caption: torch.Tensor
    phenomena: torch.Tensor
    target_maps: torch.Tensor
    target_mask: torch.Tensor
    noise: torch.Tensor
    timestep_quantile: torch.Tensor

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "sample_ids"}
        return TrainBatch(sample_ids=self.sample_ids, **tensors)


@dataclass(frozen=True)
class SemanticBatch:
    """All captions and labels of one rank's accumulation step, for the semantic alignment over the global batch.

    Attributes:
        encoder_hidden_states: `[M, L, D]`, `M` = micro-batch size times accumulation steps.
        phenomena: `[M, 17]`, label vectors `q_s`.
    """

    encoder_hidden_states: torch.Tensor
    phenomena: torch.Tensor

    def to(self, device: torch.device) -> "SemanticBatch":
        """The same batch on `device`."""
        return SemanticBatch(self.encoder_hidden_states.to(device), self.phenomena.to(device))
