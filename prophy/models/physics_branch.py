"""The Physical Branch: from noisy latents, text and time to one residual per listed block of the backbone.

It knows no family: the backbone hands it copies of its blocks, its embedding of patches and text and its
conditions, and adds the residuals. By default it never reads the backbone's hidden states, so it runs before
the first block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from prophy.models.control import PhysicsControl, RoutingOutput
from prophy.models.experts import RefinementExpertBlock, SemanticExpertBlock
from prophy.models.physics_config import BranchConfig

Residual = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""What is injected at a layer, `[B, N, D]`, or what computes it from the layer's output."""


class ZeroLinear(nn.Linear):
    """A projection that starts at zero, so that what it injects changes nothing before the first step."""

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class PhysicalBlock(nn.Module):
    """One transformer block of the branch, with the projection through which it is injected."""

    def __init__(self, block: nn.Module, hidden_dim: int) -> None:
        super().__init__()
        self.block = block
        self.injection = ZeroLinear(hidden_dim, hidden_dim)

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, *conditions: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, D]`, text `[B, L, D]` and conditions -> new tokens, text, and the tokens' residual.

        A block of two streams gives new text; of one that only reads it, the text stays.
        """
        output = self.block(hidden_states, text, *conditions)
        hidden_states, text = output if isinstance(output, tuple) else (output, text)
        return hidden_states, text, self.injection(hidden_states)


class PhysicsBranch(nn.Module):
    """Semantic Expert Block, Physical Blocks, Refinement Expert Block, in this order; each may be missing.

    Without Physical Blocks the experts act on the backbone's own stream, as in the paper's ablation: the
    semantic ones before its first block, where an injection equal to the identity would hand the backbone X~
    in the place of X; the refinement ones on what the last listed layer gives. Physical Blocks that read the
    backbone take the output of their layer, the first with the semantic experts' mixture.

    X~ = X + mixture (Eq. 1) is never formed, nor a difference of embeddings: in bfloat16 either would round
    away much of a mixture that is small beside X. Patches are embedded linearly: the mixture is, alone.

    Attributes:
        reads_backbone: whether residuals are computed from the backbone's tokens, so that there is no routing
            without them.

    Args:
        blocks: copies of the backbone's blocks, one per listed layer; or none.
        config: what else decides the branch.
        hidden_dim: width of a token.
        text_dim: width of the text that the semantic experts read.
        latent_channels: C.
    """

    semantic: SemanticExpertBlock | None
    semantic_injection: ZeroLinear | None
    refinement: RefinementExpertBlock | None
    refinement_injection: ZeroLinear | None
    _gradient_checkpointing_func: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        config: BranchConfig,
        *,
        hidden_dim: int,
        text_dim: int,
        latent_channels: int,
    ) -> None:
        super().__init__()
        self.phenomena = tuple(config.phenomena)
        self.reads_backbone = not blocks or config.blocks_read == "backbone"
        self.semantic = self.semantic_injection = self.refinement = self.refinement_injection = None
        if config.num_semantic_experts:
            self.semantic = SemanticExpertBlock(
                text_dim, config.num_semantic_experts, latent_channels, config.latent_shape
            )
            if not blocks:
                self.semantic_injection = ZeroLinear(hidden_dim, hidden_dim)
        self.blocks = nn.ModuleList(PhysicalBlock(block, hidden_dim) for block in blocks)
        if config.num_refinement_experts:
            self.refinement = RefinementExpertBlock(
                hidden_dim, config.num_refinement_experts, config.top_k, len(config.phenomena)
            )
            self.refinement_injection = ZeroLinear(hidden_dim, hidden_dim)
        self.all_tokens = nn.Identity()  # diffusers gathers here where several processes share a sample
        self.gradient_checkpointing = (
            False  # diffusers switches it on, and sets `_gradient_checkpointing_func`
        )

    def forward(
        self,
        tokens: torch.Tensor,
        text: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        latent_shape: torch.Size,
        embed_mixture: Callable[[torch.Tensor], torch.Tensor],
        conditions: tuple[object, ...],
        control: PhysicsControl,
    ) -> tuple[torch.Tensor | None, Iterator[Residual], RoutingOutput]:
        """Computes what does not need the backbone's hidden states; a residual only when it is asked for.

        Args:
            tokens: the backbone's embedding of the noisy latents X `[B, N, D]`.
            text: the backbone's embedding of the text `[B, L, D]`.
            encoder_hidden_states: the text that the semantic experts read `[B, L, text_dim]`, as its encoder
                gave it.
            latent_shape: (T, H, W) of X.
            embed_mixture: linear part of the backbone's embedding of patches, `[B, C, T, H, W]` -> tokens.
            conditions: what a block takes after tokens and text.
            control: the request's knobs.

        Returns:
            The residual `[B, N, D]` before the first block, where there are no Physical Blocks to inject the
            semantic experts; one per Physical Block, the last with the refinement in it, or without such
            blocks that of the refinement alone; and the routing, complete with the last.
        """
        routing, start, mixture = RoutingOutput(), None, None
        if self.semantic is not None:
            mixture, routing["semantic_weights"] = self._mix(
                encoder_hidden_states, latent_shape, embed_mixture, control
            )
            if self.semantic_injection is not None:
                start = self.semantic_injection(mixture) * control.scale
            tokens = tokens + mixture.to(tokens.dtype)
        if self.reads_backbone:
            return start, self._readers(mixture, text, conditions, control, routing), routing
        return start, self._residuals(tokens, text, conditions, control, routing), routing

    def _refine(
        self, control: PhysicsControl, routing: RoutingOutput, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """What the refinement experts inject `[B, N, D]` for tokens of that shape; completes `routing`."""
        assert self.refinement is not None and self.refinement_injection is not None
        refined, logits, maps = self.refinement(hidden_states, invert=control.invert_refinement)
        routing["refinement_logits"] = self.all_tokens(logits)
        routing["phenomenon_maps"] = self.all_tokens(maps)
        refinement = self.refinement_injection(refined)
        if control.strength:
            refinement = (refinement * control.token_gain(maps, self.phenomena)).to(refinement.dtype)
        return refinement * control.scale

    def _mix(
        self,
        encoder_hidden_states: torch.Tensor,
        latent_shape: torch.Size,
        embed_mixture: Callable[[torch.Tensor], torch.Tensor],
        control: PhysicsControl,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedded mixture `[B, N, D]` of a text, and rho_s: once in a request that keeps the text."""
        semantic = self.semantic
        assert semantic is not None

        def mix() -> tuple[torch.Tensor, torch.Tensor]:
            mixture, weights = semantic(encoder_hidden_states, latent_shape)
            return embed_mixture(mixture), weights

        if control.mixtures is None or torch.compiler.is_compiling():  # a graph keeps nothing between runs
            return mix()
        known = control.mixtures.setdefault(encoder_hidden_states, {})
        if (self, latent_shape) not in known:
            known[self, latent_shape] = mix()
        return known[self, latent_shape]

    def _residuals(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        conditions: tuple[object, ...],
        control: PhysicsControl,
        routing: RoutingOutput,
    ) -> Iterator[torch.Tensor]:
        for index, block in enumerate(self.blocks, start=1):
            hidden_states, text, residual = self._run_block(block, hidden_states, text, *conditions)
            residual = residual * control.scale
            if index == len(self.blocks) and self.refinement is not None:
                residual = residual + self._refine(control, routing, hidden_states)
            yield residual

    def _readers(
        self,
        mixture: torch.Tensor | None,
        text: torch.Tensor,
        conditions: tuple[object, ...],
        control: PhysicsControl,
        routing: RoutingOutput,
    ) -> Iterator[Residual]:
        """What computes the residuals from the backbone's tokens at their layers."""
        if not self.blocks:
            if self.refinement is not None:
                yield partial(self._refine, control, routing)
            return
        texts = [text]  # what each block reads: gradient checkpointing runs it again

        def read(index: int, hidden_states: torch.Tensor) -> torch.Tensor:
            if index == 0 and mixture is not None:
                hidden_states = hidden_states + mixture.to(hidden_states.dtype)
            block = self.blocks[index]
            hidden_states, following, residual = block(hidden_states, texts[index], *conditions)
            texts[index + 1 :] = [following]
            residual = residual * control.scale
            if index == len(self.blocks) - 1 and self.refinement is not None:
                residual = residual + self._refine(control, routing, hidden_states)
            return residual

        yield from (partial(read, index) for index in range(len(self.blocks)))

    def _run_block(
        self, block: nn.Module, *inputs: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
