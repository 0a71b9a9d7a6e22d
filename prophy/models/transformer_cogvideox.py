"""CogVideoX's transformer with a Physical Branch: upstream's forward and an addition per listed block."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

# DiffusionPipeline.from_pretrained looks for ModelMixin in the module of a component.
from diffusers import CogVideoXTransformer3DModel, ModelMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils import apply_lora_scale
from torch import nn

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl
from prophy.models.physics_transformer import (
    EXPERT_BLOCKS,
    PhysicsTransformer,
    ProPhyTransformerOutput,
    Residual,
    inject,
)

Rotary = tuple[torch.Tensor, torch.Tensor]
_OFS = 2.0  # what upstream's pipeline gives every video of an image (CogVideoX 1.5)


class InjectedCogVideoXBlock(CogVideoXBlock):
    """A listed block. It adds its residual itself: a step cache, which wraps blocks, then counts it once."""

    run_block = CogVideoXBlock.forward  # what is compiled: a residual may be computed after it

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        residual: Residual | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As upstream's, then the residual on the video stream."""
        hidden_states, text = self.run_block(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        return inject(hidden_states, residual), text


TransformerBlockRegistry.register(
    InjectedCogVideoXBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)


class ProPhyCogVideoXTransformer3DModel(PhysicsTransformer, CogVideoXTransformer3DModel):
    """`CogVideoXTransformer3DModel` (1.0 or 1.5) with a Physical Branch, `physics_branch`.

    The branch carries its own text stream; only its video stream is injected. Before any training the output
    equals the backbone's bit for bit. The arguments are upstream's, then:

    Args:
        lora_rank: rank of an adapter on the backbone's attention; None for none.
        lora_alpha: its output is scaled by alpha / rank.
        physics: the branch, a `BranchConfig` as JSON.
    """

    _no_split_modules: ClassVar = [
        "CogVideoXBlock",
        "InjectedCogVideoXBlock",
        "CogVideoXPatchEmbed",
        "PhysicalBlock",
    ]
    _keep_in_fp32_modules: ClassVar = ["router"]
    _repeated_blocks: ClassVar = ["CogVideoXBlock", "InjectedCogVideoXBlock", *EXPERT_BLOCKS]
    semantic_text = "prompt_embeds"
    _block_list = "transformer_blocks"
    _block = CogVideoXBlock
    _injected_block = InjectedCogVideoXBlock
    _text_dim = "text_embed_dim"

    # Written out in full: with **kwargs, `from_pretrained` would lose upstream's part of the configuration.
    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
        lora_rank: int | None = None,
        lora_alpha: int | None = None,
        *,
        physics: dict[str, Any],
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            time_embed_dim=time_embed_dim,
            ofs_embed_dim=ofs_embed_dim,
            text_embed_dim=text_embed_dim,
            num_layers=num_layers,
            dropout=dropout,
            attention_bias=attention_bias,
            sample_width=sample_width,
            sample_height=sample_height,
            sample_frames=sample_frames,
            patch_size=patch_size,
            patch_size_t=patch_size_t,
            temporal_compression_ratio=temporal_compression_ratio,
            max_text_seq_length=max_text_seq_length,
            activation_fn=activation_fn,
            timestep_activation_fn=timestep_activation_fn,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            spatial_interpolation_scale=spatial_interpolation_scale,
            temporal_interpolation_scale=temporal_interpolation_scale,
            use_rotary_positional_embeddings=use_rotary_positional_embeddings,
            use_learned_positional_embeddings=use_learned_positional_embeddings,
            patch_bias=patch_bias,
        )
        self._add_branch()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        ofs: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> ProPhyTransformerOutput | tuple[torch.Tensor]:
        """Predicts the velocity at `timestep`.

        Args:
            hidden_states: noisy latents `[B, T, C, H, W]`, before the channels of an image, where those are;
                T and H, W fill the patches.
            encoder_hidden_states: text encoder output `[B, L, text_embed_dim]`.
            timestep: `[B]`, 0 to 999.
            ofs: `[1]`, which 1.5 reads of images alone.
            image_rotary_emb: positions as the pipeline makes them.
            attention_kwargs: may hold `physics`, a `PhysicsControl`.
            return_dict: False gives the tuple (sample,), as diffusers' pipelines want it.
        """
        batch_size, num_frames, _, height, width = hidden_states.shape
        p_t, p = self.config.patch_size_t or 1, self.config.patch_size
        token_grid = (num_frames // p_t, height // p, width // p)

        # 1. Embeddings and conditions, shared by backbone and branch
        latent_shape = torch.Size((num_frames, height, width))
        hidden_states, text, conditions = self._embed(
            hidden_states, timestep, encoder_hidden_states, ofs, image_rotary_emb
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
        for layer, block in enumerate(self.transformer_blocks):
            injected = (residuals[layer],) if layer in residuals else ()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, text = self._gradient_checkpointing_func(
                    block, hidden_states, text, *conditions, *injected
                )
            else:
                hidden_states, text = block(hidden_states, text, *conditions, *injected)

        # 4. Output norm, projection and unpatchify
        hidden_states = self.norm_out(self.norm_final(hidden_states), temb=conditions[0])
        hidden_states = self.proj_out(hidden_states).reshape(batch_size, *token_grid, -1, p_t, p, p)
        # [B, T', H', W', C, p_t, p, p] -> [B, T', p_t, C, H', p, W', p]
        sample = hidden_states.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

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
        hidden_states = self._beside_image(latents, text.get("image_latents")).transpose(1, 2)
        output = self(
            hidden_states,
            text["prompt_embeds"],
            timestep,
            self._ofs(latents),
            self._rotary(latents),
            attention_kwargs={"physics": physics},
        )
        return ProPhyTransformerOutput(sample=output.sample.transpose(1, 2), routing=output.routing)

    def rotary_embeddings(self, latents: torch.Tensor) -> Rotary:
        """Positions of the tokens of latents `[B, C, T, H, W]`, as upstream's pipeline makes them.

        Raises:
            ProPhyError: the latents are higher or wider than those that CogVideoX 1.5 has positions for.
        """
        config = self.config
        num_frames, height, width = latents.shape[2:]
        p = config.patch_size
        grid, base = (height // p, width // p), (config.sample_height // p, config.sample_width // p)
        if config.patch_size_t is None:  # 1.0 scales positions to those of the native size
            crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
            options = {"crops_coords": crop, "temporal_size": num_frames}
        elif grid[0] > base[0] or grid[1] > base[1]:
            raise ProPhyError(
                f"the backbone has positions for latents of up to {config.sample_height}x"
                f"{config.sample_width}, not for {height}x{width}; make the clips smaller"
            )
        else:  # 1.5 counts tokens
            size = num_frames // config.patch_size_t
            options = {"crops_coords": None, "temporal_size": size, "grid_type": "slice", "max_size": base}
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim, grid_size=grid, device=latents.device, **options
        )

    def _new_block(self, block: type[nn.Module]) -> nn.Module:
        config = self.config
        return block(
            dim=config.num_attention_heads * config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            time_embed_dim=config.time_embed_dim,
            dropout=config.dropout,
            activation_fn=config.activation_fn,
            attention_bias=config.attention_bias,
            norm_elementwise_affine=config.norm_elementwise_affine,
            norm_eps=config.norm_eps,
        )

    def _embed(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        ofs: torch.Tensor | None,
        rotary: Rotary | None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, Rotary | None]]:
        """Tokens `[B, N, D]` of latents `[B, T, C, H, W]`, and of text `[B, L, D]`: this process's of both.

        And what a block takes after these: embedded time `[B, D_t]`, and the positions of the tokens.
        """
        temb = self.time_embedding(self.time_proj(timestep).to(latents.dtype))
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(latents.dtype))
        embedded = self.embedding_dropout(self.patch_embed(encoder_hidden_states, latents))
        text_length = encoder_hidden_states.shape[1]
        tokens, text = self._own(embedded[:, text_length:]), self._own(embedded[:, :text_length])
        return tokens, text, (temb, rotary and (self._own(rotary[0]), self._own(rotary[1])))

    def _embed_inputs(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[object, ...]]:
        """See the base class."""
        hidden_states = self._beside_image(latents, text.get("image_latents")).transpose(1, 2)
        return self._embed(
            hidden_states, timestep, text["prompt_embeds"], self._ofs(latents), self._rotary(latents)
        )

    def _beside_image(self, latents: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
        """Noisy latents `[B, C, T, H, W]`, and the channels of an image: its latents in the first frame."""
        if image_latents is None:
            return latents
        image = torch.cat([image_latents.to(latents.dtype), torch.zeros_like(latents[:, :, 1:])], dim=2)
        return torch.cat([latents, image], dim=1)

    def _ofs(self, latents: torch.Tensor) -> torch.Tensor | None:
        """What the pipeline gives as `ofs`, where the backbone reads it."""
        return None if self.config.ofs_embed_dim is None else latents.new_full((1,), _OFS)

    def _rotary(self, latents: torch.Tensor) -> Rotary | None:
        """`rotary_embeddings`, where the backbone has them."""
        return self.rotary_embeddings(latents) if self.config.use_rotary_positional_embeddings else None

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        length = self.config.max_text_seq_length
        text = latents.new_zeros(len(latents), length, self.config.text_embed_dim)
        return self.patch_embed(text, latents.transpose(1, 2))[:, length:]
