"""Configurations of the published backbones, for what needs no weights and no network."""

from typing import Any

# By hub id, what `transformer/config.json` says where it is not the default of diffusers' class.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {},
    "zai-org/CogVideoX-2b": {},
    "zai-org/CogVideoX-5b": {
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    "zai-org/CogVideoX1.5-5B": {
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_frames": 81,
        "sample_height": 96,
        "sample_width": 170,
    },
}

# By family, what `vae/config.json` says about how much the VAE shrinks time and space.
VAES: dict[str, dict[str, Any]] = {
    "wan": {"scale_factor_temporal": 4, "scale_factor_spatial": 8},
    "cogvideox": {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4},
}
