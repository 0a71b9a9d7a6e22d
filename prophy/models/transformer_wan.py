"""Wan's transformer with a Physical Branch beside it: upstream's forward and an addition per listed block."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

# DiffusionPipeline.from_pretrained looks for ModelMixin in the module of a component.
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import nn

from prophy.models.control import PhysicsControl
from prophy.models.physics_transformer import (
    EXPERT_BLOCKS,
    PhysicsTransformer,
    ProPhyTransformerOutput,
    Residual,
    inject,
)

_MASK_CHANNELS = 4  # one per frame of a latent one


class InjectedWanTransformerBlock(WanTransformerBlock):
    """A listed block. It adds its residual itself: a step cache, which wraps blocks, then counts it once."""

    run_block = WanTransformerBlock.forward  # what is compiled: a residual may be computed after it

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: torch.Tensor,
        residual: Residual | None = None,
    ) -> torch.Tensor:
        """As upstream's, then the residual."""
        return inject(self.run_block(hidden_states, encoder_hidden_states, temb, rotary_emb), residual)


TransformerBlockRegistry.register(
    InjectedWanTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0)
)


class ProPhyWanTransformer3DModel(PhysicsTransformer, WanTransformer3DModel):
    """`WanTransformer3DModel` with a Physical Branch, `physics_branch`, beside its blocks.

    Before any training its output equals the backbone's bit for bit. The arguments are upstream's, then:

    Args:
        lora_rank: rank of an adapter on the backbone's attention; None for none.
        lora_alpha: its output is scaled by alpha / rank.
        physics: the branch, a `BranchConfig` as JSON.
    """

    _no_split_modules: ClassVar = ["WanTransformerBlock", "InjectedWanTransformerBlock", "PhysicalBlock"]
    _keep_in_fp32_modules: ClassVar = [*WanTransformer3DModel._keep_in_fp32_modules, "router"]
    _repeated_blocks: ClassVar = ["WanTransformerBlock", "InjectedWanTransformerBlock", *EXPERT_BLOCKS]
    _cp_plan: ClassVar = PhysicsTransformer._cp_plan | {"rope": WanTransformer3DModel._cp_plan["rope"]}
    semantic_text = "prompt_embeds"
    _block_list = "blocks"
    _block = WanTransformerBlock
    _injected_block = InjectedWanTransformerBlock
    _text_dim = "text_dim"

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
        lora_rank: int | None = None,
        lora_alpha: int | None = None,
        *,
        physics: dict[str, Any],
    ) -> None:
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
        self._add_branch()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ProPhyTransformerOutput | tuple[torch.Tensor]:
        """Predicts the flow at `timestep`.

        Args:
            hidden_states: noisy latents `[B, C, T, H, W]`; before the channels of an image, where those are.
            timestep: `[B]`, 0 to 1000; or `[B, N]`, of each token, as Wan2.2-TI2V-5B takes them: 0 where the
                latent frame is given.
            encoder_hidden_states: text encoder output `[B, L, text_dim]`.
            encoder_hidden_states_image: image encoder output `[B, M, image_dim]`, where the model reads it.
            return_dict: False gives the tuple (sample,), as diffusers' pipelines want it.
            attention_kwargs: may hold `physics`, a `PhysicsControl`.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size
        token_grid = (num_frames // p_t, height // p_h, width // p_w)

        # 1. Embeddings and conditions, shared by backbone and branch
        latent_shape = hidden_states.shape[2:]
        temb, hidden_states, text, conditions = self._embed(
            hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        )

        # 2. Physical Branch
        residuals, routing = self._run_branch(
            hidden_states,
            text,
            encoder_hidden_states,
            latent_shape,
            conditions,
            attention_kwargs,
            timestep,
            token_grid,
        )

        # 3. Transformer blocks
        hidden_states = inject(hidden_states, residuals.get(-1))
        for layer, block in enumerate(self.blocks):
            injected = (residuals[layer],) if layer in residuals else ()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, text, *conditions, *injected
                )
            else:
                hidden_states = block(hidden_states, text, *conditions, *injected)

        # 4. Output norm, projection and unpatchify
        if temb.ndim == 3:  # of each token
            table = self.scale_shift_table.unsqueeze(0).to(temb.device)
            shift, scale = (part.squeeze(2) for part in (table + temb.unsqueeze(2)).chunk(2, dim=2))
        else:
            shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, *token_grid, p_t, p_h, p_w, -1)
        sample = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return (sample,)
        return ProPhyTransformerOutput(sample=sample, routing=routing)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        physics: PhysicsControl | None = None,
    ) -> ProPhyTransformerOutput:
        """See the base class."""
        hidden_states = _beside_image(latents, text.get("image_latents"))
        attention_kwargs = {"physics": physics}
        return self(
            hidden_states,
            timestep,
            text["prompt_embeds"],
            text.get("image_embeds"),
            attention_kwargs=attention_kwargs,
        )

    def _new_block(self, block: type[nn.Module]) -> nn.Module:
        config = self.config
        return block(
            config.num_attention_heads * config.attention_head_dim,
            config.ffn_dim,
            config.num_attention_heads,
            config.qk_norm,
            config.cross_attn_norm,
            config.eps,
            config.added_kv_proj_dim,
        )

    def _embed(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[object, ...]]:
        """Embedded time `[B, D]`, tokens `[B, N, D]`, text `[B, L, D]`; what a block takes after these.

        Of the tokens, this process's. Where each has a timestep of its own, embedded time is `[B, N, D]`. An
        image's tokens, if the model reads any, stand before the text's.
        """
        if timestep.ndim == 2:
            timestep = self._own(timestep[..., None])[..., 0]
        temb, timestep_proj, text, image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, _tokens_of(timestep)
        )
        if image is not None:
            text = torch.cat([image, text], dim=1)
        return (
            temb,
            self._own(self._embed_patches(latents)),
            text,
            (timestep_proj.unflatten(-1, (6, -1)), self.rope(latents)),
        )

    def _embed_inputs(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[object, ...]]:
        """See the base class."""
        hidden_states = _beside_image(latents, text.get("image_latents"))
        return self._embed(hidden_states, timestep, text["prompt_embeds"], text.get("image_embeds"))[1:]

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()


def _tokens_of(timestep: torch.Tensor) -> int | None:
    """How many timesteps a sample has, where each token has its own."""
    return timestep.shape[1] if timestep.ndim == 2 else None


def _beside_image(latents: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    """Noisy latents, a mask of the frames that are given (4 channels: the first), and an image's latents."""
    if image_latents is None:
        return latents
    mask = torch.zeros_like(latents[:, :1]).repeat(1, _MASK_CHANNELS, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([latents, mask, image_latents.to(latents.dtype)], dim=1)
