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


@dataclass
class ProPhyTransformerOutput(BaseOutput):
    """Output of a transformer with a Physical Branch.

    Attributes:
        sample: the prediction, like the latents.
        routing: what the routers said; None where the branch was skipped.
    """

    sample: torch.Tensor
    routing: RoutingOutput | None = None


class PhysicsTransformer(ModelMixin):
    """Base of the transformers with a branch, before diffusers' own class in the order of bases.

    A family names its `_block_list` (attribute) and `_text_dim` (key of the configuration), makes a
    `_new_block`, and gives `predict`. Its `__init__` ends with `self.physics_branch = self._new_branch()`.
    """

    physics_branch: PhysicsBranch
    _block_list: ClassVar[str]
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
        for name, parameter in backbone.named_parameters(recurse=False):
            setattr(model, name, parameter)
        for name, module in backbone.named_children():
            setattr(model, name, module)
        model.physics_branch = model._new_branch().to(backbone.device, backbone.dtype)
        blocks = getattr(backbone, cls._block_list)
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

    def _new_block(self) -> nn.Module:
        raise NotImplementedError

    def _new_branch(self) -> PhysicsBranch:
        config = self.config
        return PhysicsBranch(
            [self._new_block() for _ in config.physics_layers],
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
    ) -> tuple[dict[int, torch.Tensor], RoutingOutput | None]:
        """Residual `[B, N, D]` of each listed layer, and the routing; nothing where the request's scale is 0.

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
        residuals, routing = self.physics_branch(latents, encoder_hidden_states, embed, conditions, control)
        if control.trace is not None:
            control.trace.record(timestep[0].item(), routing, token_grid)
        return dict(zip(self.config.physics_layers, residuals, strict=True)), routing


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
