"""Wan's transformer with a Physical Branch beside it: upstream's forward and an addition per listed block."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

# DiffusionPipeline.from_pretrained looks for ModelMixin in the module of a component.
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import BaseOutput, apply_lora_scale

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, RoutingOutput
from prophy.models.physics_branch import PhysicsBranch
from prophy.taxonomy import NUM_PHENOMENA


@dataclass
class ProPhyTransformerOutput(BaseOutput):
    """Output of a transformer with a Physical Branch.

    Attributes:
        sample: the prediction, like the latents.
        routing: what the routers said; None where the branch was skipped.
    """

    sample: torch.Tensor
    routing: RoutingOutput | None = None


class ProPhyWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` (text to video) with a Physical Branch, `physics_branch`, beside its blocks.

    Before any training its output equals the backbone's bit for bit. The arguments are upstream's, then:

    Args:
        physics_layers: blocks of the backbone that get a Physical Block, ascending.
        num_semantic_experts: E_s.
        num_refinement_experts: E_r.
        top_k: refinement experts per token.
        latent_shape: native (T, H, W) of the basis maps.
        num_phenomena: E_phys.
    """

    _no_split_modules: ClassVar = ["WanTransformerBlock", "PhysicalBlock"]

    # Written out in full: with **kwargs, `from_pretrained` would lose upstream's part of the configuration.
    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        physics_layers: tuple[int, ...] = (0, 3, 6, 9, 12, 15, 18, 21, 24),
        num_semantic_experts: int = 8,
        num_refinement_experts: int = 8,
        top_k: int = 2,
        latent_shape: tuple[int, int, int] = (21, 60, 104),
        num_phenomena: int = NUM_PHENOMENA,
    ) -> None:
        if image_dim is not None:
            raise ProPhyError("the backbone is image-to-video (image_dim is set); choose a text-to-video one")
        if max(physics_layers) >= num_layers:
            raise ProPhyError(
                f"physics_layers {list(physics_layers)} go beyond the backbone's {num_layers} blocks; "
                f"give indices from 0 to {num_layers - 1}"
            )
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        self.physics_branch = self._new_branch()

    @classmethod
    def from_transformer(cls, backbone: WanTransformer3DModel, **physics: Any) -> Self:
        """Puts a new branch beside `backbone`, its blocks copied from the listed ones.

        The backbone's parameters are taken over, not copied: the two share memory.

        Args:
            backbone: any text-to-video Wan transformer.
            physics: this class's own arguments, `physics_layers` and so on.

        Raises:
            ProPhyError: the backbone is image-to-video, or has fewer blocks than `physics_layers` asks for.
        """
        config = {name: value for name, value in backbone.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(**config, **physics)
        model.scale_shift_table = backbone.scale_shift_table
        for name, module in backbone.named_children():
            setattr(model, name, module)
        model.physics_branch = model._new_branch().to(backbone.device, backbone.dtype)
        for physical_block, layer in zip(
            model.physics_branch.blocks, model.config.physics_layers, strict=True
        ):
            physical_block.block = copy.deepcopy(backbone.blocks[layer])
        return model

    def freeze_backbone(self) -> None:
        """Leaves gradients to the branch alone."""
        self.requires_grad_(False)
        self.physics_branch.requires_grad_(True)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ProPhyTransformerOutput | tuple[torch.Tensor]:
        """Predicts the flow at `timestep`.

        Args:
            hidden_states: noisy latents `[B, C, T, H, W]`.
            timestep: `[B]`, 0 to 1000.
            encoder_hidden_states: text encoder output `[B, L, text_dim]`.
            return_dict: False gives the tuple (sample,), as diffusers' pipelines want it.
            attention_kwargs: may hold `physics`, a `PhysicsControl`.
        """
        control = (attention_kwargs or {}).get("physics") or PhysicsControl()
        batch_size, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size
        token_grid = (num_frames // p_t, height // p_h, width // p_w)

        # 1. Conditions, shared by backbone and branch
        rotary_emb = self.rope(hidden_states)
        temb, timestep_proj, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        conditions = (text, timestep_proj.unflatten(1, (6, -1)), rotary_emb)

        # 2. Physical Branch
        residuals, routing = {}, None
        if control.scale != 0:
            branch_residuals, routing = self.physics_branch(
                hidden_states, encoder_hidden_states, self._embed_patches, conditions, control
            )
            residuals = dict(zip(self.config.physics_layers, branch_residuals, strict=True))
            if control.trace is not None:
                control.trace.record(timestep[0].item(), routing, token_grid)

        # 3. Transformer blocks
        hidden_states = self._embed_patches(hidden_states)
        for layer, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *conditions)
            else:
                hidden_states = block(hidden_states, *conditions)
            if layer in residuals:
                hidden_states = hidden_states + residuals[layer].to(hidden_states.dtype)

        # 4. Output norm, projection and unpatchify
        shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, *token_grid, p_t, p_h, p_w, -1)
        sample = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return (sample,)
        return ProPhyTransformerOutput(sample=sample, routing=routing)

    def _new_branch(self) -> PhysicsBranch:
        config = self.config
        hidden_dim = config.num_attention_heads * config.attention_head_dim
        blocks = [
            WanTransformerBlock(
                hidden_dim,
                config.ffn_dim,
                config.num_attention_heads,
                config.qk_norm,
                config.cross_attn_norm,
                config.eps,
            )
            for _ in config.physics_layers
        ]
        return PhysicsBranch(
            blocks,
            hidden_dim=hidden_dim,
            text_dim=config.text_dim,
            latent_channels=config.in_channels,
            latent_shape=tuple(config.latent_shape),
            num_semantic_experts=config.num_semantic_experts,
            num_refinement_experts=config.num_refinement_experts,
            top_k=config.top_k,
            num_phenomena=config.num_phenomena,
        )

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
