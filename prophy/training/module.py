"""From a batch to a loss: noise, forward, and the four losses of Eq. 6. Trains in bare torch too.

It knows no engine; only that gradients are averaged over the ranks of torch.distributed and over the
micro-steps of an accumulation. Ranks that share their samples (`enable_parallelism` of the transformer) are
successive ones, and have the same batches; each has the gradients that its tokens give.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from diffusers.utils import BaseOutput
from torch import nn

from prophy.models.physics_transformer import PhysicsTransformer
from prophy.training.data import SemanticBatch, TrainBatch
from prophy.training.losses import (
    Alignment,
    Reduction,
    diffusion_loss,
    load_balancing_loss,
    semantic_alignment_loss,
    token_alignment_loss,
)
from prophy.training.losses import expert_load as load_of
from prophy.training.objectives import Objective, give_first_latent


class LossWeights(Protocol):
    """The weights of Eq. 6; that of the diffusion loss is 1."""

    @property
    def semantic_alignment(self) -> float:
        """Weight of L_coarse (Eq. 4)."""

    @property
    def token_alignment(self) -> float:
        """Weight of L_fine_align (Eq. 5)."""

    @property
    def load_balancing(self) -> float:
        """Weight of L_fine_balance."""


@dataclass
class LossOutput(BaseOutput):
    """Losses and router statistics of a micro-batch: float32, detached but for `loss`; scalars but the load.

    Those of experts that the branch lacks are None; an alignment is NaN where there is nothing to align. A
    dictionary too (diffusers' BaseOutput): ZeRO-3 finds tensors in dictionaries, but not in dataclasses.

    Attributes:
        loss: what to call `backward` on.
        diffusion: mean squared error of the prediction.
        token_alignment: L_fine_align of the micro-batch; its mean over micro-batches and ranks is that of the
            global batch.
        load_balancing: L_fine_balance likewise.
        router_entropy: entropy of rho_r in nats, mean over tokens; log E_r is uniform.
        expert_load: `[E_r]`, share of the tokens' choices in the global batch that falls on each expert;
            1 / E_r is balanced.
        semantic_alignment: L_coarse over the global batch; None where no captions were given.
    """

    loss: torch.Tensor
    diffusion: torch.Tensor
    token_alignment: torch.Tensor | None = None
    load_balancing: torch.Tensor | None = None
    router_entropy: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
    semantic_alignment: torch.Tensor | None = None


class ProPhyTrainModule(nn.Module):
    """A transformer with a Physical Branch, and what it is trained on.

    Args:
        transformer: trains whatever of it requires gradients.
        objective: what it predicts.
        null_text: the empty prompt, encoded, for dropped captions: one of each tensor of `TrainBatch.text`.
        loss_weights: the weights of Eq. 6.
        reduction: how both alignment losses add up.
        alignment: what holds maps against targets.
        gradient_accumulation_steps: micro-steps whose gradients the engine averages.
        takes_first_latent: whether the transformer may be given the first latent frame, and so takes a
            timestep of each token.
    """

    def __init__(
        self,
        transformer: PhysicsTransformer,
        objective: Objective,
        null_text: Mapping[str, torch.Tensor],
        loss_weights: LossWeights,
        reduction: Reduction,
        alignment: Alignment,
        gradient_accumulation_steps: int,
        takes_first_latent: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.objective = objective
        self.loss_weights = loss_weights
        self.reduction = reduction
        self.alignment = alignment
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.takes_first_latent = takes_first_latent
        self.null_text = nn.Module()
        for name, value in null_text.items():
            self.null_text.register_buffer(name, value, persistent=False)

    def forward(
        self,
        batch: TrainBatch,
        semantic: SemanticBatch | None = None,
        expert_load: torch.Tensor | None = None,
        later: Iterable[TrainBatch] = (),
    ) -> LossOutput:
        """Computes the loss of one micro-batch.

        Load balancing is over the global batch, so that its gradient at the first micro-step depends on what
        the later ones choose: they are routed ahead, without a graph and without the backbone's blocks.

        Args:
            batch: the micro-batch.
            semantic: all captions of this rank's accumulation step, as many on every rank; given at one of
                its micro-steps (the last). Its loss is over the pairs of all ranks' samples.
            expert_load: that of the output of the first micro-step; None at the first.
            later: the micro-batches after the first, as many on every rank; given at the first.
        """
        shares = self.transformer.processes_per_sample

        # 1. What the later micro-batches choose
        branch = self.transformer.physics_branch
        ahead = [self._choices(other) for other in later] if branch.refinement is not None else []

        # 2. Forward
        noisy, timesteps, text = self._inputs(batch)
        output = self.transformer.predict(noisy, timesteps, text)
        target = self._target(batch)
        assert output.routing is not None  # the branch is skipped by a knob of requests alone

        # 3. Losses (Eq. 6), of the experts that there are
        loss = diffusion_loss(output.sample, target, batch.given)
        terms = {"diffusion": loss.detach()}
        if branch.refinement is not None:
            logits, maps = output.routing.refinement_logits, output.routing.phenomenon_maps
            assert logits is not None and maps is not None
            alignment = token_alignment_loss(
                maps, batch.target_maps, batch.target_mask, self.reduction, self.alignment
            )
            if self.reduction == "sum":
                alignment = alignment * self._undo_averaging()
            if expert_load is None:
                own = load_of(logits, self.transformer.physics.top_k)
                expert_load = _mean_over_ranks(torch.stack([own, *ahead]).mean(dim=0))
            balancing = load_balancing_loss(logits, expert_load)
            loss = loss + self.loss_weights.token_alignment * alignment
            loss = loss + self.loss_weights.load_balancing * balancing
            terms["token_alignment"] = _where(batch.target_mask.any(), alignment)
            terms["load_balancing"] = balancing.detach()
            log_weights = logits.detach().log_softmax(dim=-1)
            terms["router_entropy"] = -(log_weights.exp() * log_weights).sum(dim=-1).mean()
            terms["expert_load"] = expert_load
        loss = shares * loss  # the gradients of ranks that share a sample add up to the sample's
        if branch.semantic is not None and semantic is not None:
            # Over the captions of all ranks; only this rank's rows carry gradient, all of it.
            captions = semantic.text[self.transformer.semantic_text].to(noisy.dtype)
            weights = _gather(branch.semantic.router(captions), shares)
            labels = _gather(semantic.phenomena, shares)
            alignment = semantic_alignment_loss(weights, labels, self.reduction)
            loss = loss + self._undo_averaging() * self.loss_weights.semantic_alignment * alignment
            has_pairs = labels.any(dim=1).sum() > 1
            terms["semantic_alignment"] = _where(has_pairs, alignment)
        return LossOutput(loss=loss, **terms)

    def _inputs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Noisy latents, timesteps and text, in the precision that the pipeline gives its inputs too.

        The text is that of the empty prompt where the caption is dropped.
        """
        timesteps = self.objective.timesteps(batch.timestep_quantile)
        noisy = self.objective.add_noise(batch.latents, batch.noise, timesteps)
        if self.takes_first_latent:
            num_tokens = batch.target_maps.shape[1]
            noisy, timesteps = give_first_latent(noisy, batch.latents, timesteps, batch.given, num_tokens)
        text = dict(batch.text)
        for name, null in self.null_text.named_buffers():  # an image is never dropped
            dropped = batch.drop_caption.view(-1, *[1] * null.dim())
            text[name] = torch.where(dropped, null, batch.text[name])
        dtype = self.transformer.dtype
        text = {name: value.to(dtype) for name, value in text.items()}
        return noisy.to(dtype), timesteps, text

    def _target(self, batch: TrainBatch) -> torch.Tensor:
        """What the transformer shall predict of latents of which none is given, like these."""
        timesteps = self.objective.timesteps(batch.timestep_quantile)
        return self.objective.target(batch.latents, batch.noise, timesteps)

    @torch.no_grad()
    def _choices(self, batch: TrainBatch) -> torch.Tensor:
        """Share of a micro-batch's choices that falls on each expert `[E_r]`."""
        logits = self.transformer.route(*self._inputs(batch)).refinement_logits
        assert logits is not None
        # It holds weights that were cast without a graph: the forward pass with one would take them.
        torch.clear_autocast_cache()
        return load_of(logits, self.transformer.physics.top_k)

    def _undo_averaging(self) -> int:
        """What each sample adds to the gradient shall be summed, not averaged, over ranks and micro-steps."""
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        return num_ranks // self.transformer.processes_per_sample * self.gradient_accumulation_steps


def _where(condition: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """A loss without its graph, or NaN."""
    return torch.where(condition, loss.detach(), torch.nan)


def _mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized():
        return value
    dist.all_reduce(value)
    return value / dist.get_world_size()


def _gather(own: torch.Tensor, shares: int) -> torch.Tensor:
    """Rows of all ranks, in their order, once where `shares` have the same; this rank's carry gradient."""
    if not dist.is_initialized():
        return own
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own.detach().contiguous())
    rows = rows[::shares]
    rows[dist.get_rank() // shares] = own
    return torch.cat(rows)
