"""What every backbone with a Physical Branch has in common, whatever its family."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, RoutingOutput
from prophy.models.physics_branch import PhysicsBranch

Residual = torch.Tensor | Callable[[], torch.Tensor]
"""What is injected at a layer, `[B, N, D]`, or what computes it."""


@dataclass
class ProPhyTransformerOutput(BaseOutput):
    """Output of a transformer with a Physical Branch.

    Attributes:
        sample: the prediction, like the latents.
        routing: what the routers said; None where the branch was skipped, or a step cache may skip it.
    """

    sample: torch.Tensor
    routing: RoutingOutput | None = None


class PhysicsTransformer(ModelMixin):
    """Base of the transformers with a branch, before diffusers' own class in the order of bases.

    A family names its `_block_list` (attribute), its `_block` and `_injected_block` (classes) and `_text_dim`
    (key of the configuration), makes a `_new_block`, and gives `predict`. Its `__init__` ends with
    `self._add_branch()`.
    """

    physics_branch: PhysicsBranch
    _block_list: ClassVar[str]
    _block: ClassVar[type[nn.Module]]
    _injected_block: ClassVar[type[nn.Module]]
    _text_dim: ClassVar[str]

    @classmethod
    def from_transformer(cls, backbone: ModelMixin, **physics: Any) -> Self:
        """Puts a new branch beside `backbone`, its blocks copied from the listed ones.

        The backbone's parameters are taken over, not copied: the two share memory.

        Args:
            backbone: a text-to-video transformer of this family.
            physics: this class's own arguments, `physics_layers` and so on.

        Raises:
            ProPhyError: the backbone is image-to-video, or has fewer blocks than `physics_layers` asks for.
        """
        config = {name: value for name, value in backbone.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(**config, **physics)
        own_blocks, blocks = getattr(model, cls._block_list), getattr(backbone, cls._block_list)
        _take_over(model, backbone)
        setattr(model, cls._block_list, own_blocks)
        for layer, block in enumerate(blocks):
            if layer in model.config.physics_layers:
                _take_over(own_blocks[layer], block)
            else:
                own_blocks[layer] = block
        model.physics_branch = model._new_branch().to(backbone.device, backbone.dtype)
        for physical_block, layer in zip(
            model.physics_branch.blocks, model.config.physics_layers, strict=True
        ):
            physical_block.block = copy.deepcopy(blocks[layer])
        return model

    def freeze_backbone(self) -> None:
        """Leaves gradients to the branch alone."""
        self.requires_grad_(False)
        self.physics_branch.requires_grad_(True)

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> ProPhyTransformerOutput:
        """The forward pass in one form for all families: latents and prediction are `[B, C, T, H, W]`."""
        raise NotImplementedError

    def _new_block(self, block: type[nn.Module]) -> nn.Module:
        raise NotImplementedError

    def _add_branch(self) -> None:
        blocks = getattr(self, self._block_list)
        for layer in self.config.physics_layers:
            blocks[layer] = self._new_block(self._injected_block)
        self.physics_branch = self._new_branch()

    def _new_branch(self) -> PhysicsBranch:
        config = self.config
        return PhysicsBranch(
            [self._new_block(self._block) for _ in config.physics_layers],
            hidden_dim=config.num_attention_heads * config.attention_head_dim,
            text_dim=config[self._text_dim],
            latent_channels=config.in_channels,
            latent_shape=tuple(config.latent_shape),
            num_semantic_experts=config.num_semantic_experts,
            num_refinement_experts=config.num_refinement_experts,
            top_k=config.top_k,
            num_phenomena=config.num_phenomena,
        )

    def _run_branch(
        self,
        latents: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        embed: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        conditions: tuple[object, ...],
        attention_kwargs: dict[str, Any] | None,
        timestep: torch.Tensor,
        token_grid: tuple[int, int, int],
    ) -> tuple[dict[int, Residual], RoutingOutput | None]:
        """Residual of each listed layer, and the routing; nothing where the request's scale is 0.

        With a step cache, a residual is computed when its block asks for it: what is skipped costs nothing.
        A trace wants the routing of every step, so there the whole branch runs.

        Args:
            latents: `[B, C, T, H, W]`.
            encoder_hidden_states: text encoder output `[B, L, text_dim]`.
            embed: the backbone's own: latents -> tokens and embedded text.
            conditions: what a block takes after tokens and text.
            attention_kwargs: may hold `physics`, a `PhysicsControl`.
            timestep: `[B]`.
            token_grid: `(T', H', W')`.
        """
        control = (attention_kwargs or {}).get("physics") or PhysicsControl()
        if control.scale == 0:
            return {}, None
        inputs = (latents, encoder_hidden_states, embed, conditions, control)
        if self.is_cache_enabled and control.trace is None:
            steps = self.physics_branch.run(*inputs)
            return dict.fromkeys(self.config.physics_layers, lambda: next(steps)[0]), None
        residuals, routing = self.physics_branch(*inputs)
        if control.trace is not None:
            control.trace.record(timestep[0].item(), routing, token_grid)
        return dict(zip(self.config.physics_layers, residuals, strict=True)), routing


def inject(hidden_states: torch.Tensor, residual: Residual | None) -> torch.Tensor:
    """Adds what the branch has for this layer, if anything, to tokens `[B, N, D]`."""
    if residual is None:
        return hidden_states
    added = residual() if callable(residual) else residual
    return hidden_states + added.to(hidden_states.dtype)


def _take_over(module: nn.Module, source: nn.Module) -> None:
    """Gives `module` the parameters and children of `source`."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(module, name, parameter)
    for name, child in source.named_children():
        setattr(module, name, child)


def check_layers(physics_layers: Sequence[int], num_layers: int) -> None:
    """Checks that the backbone has the listed layers.

    Raises:
        ProPhyError: it has fewer.
    """
    if max(physics_layers) >= num_layers:
        raise ProPhyError(
            f"physics_layers {list(physics_layers)} go beyond the backbone's {num_layers} blocks; "
            f"give indices from 0 to {num_layers - 1}"
        )
