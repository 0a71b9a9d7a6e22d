"""CogVideoX 1.0 and 1.5, text to video."""

from prophy.backbones.families import Classes, Family, ModelConfig


def _unsupported(pipeline: ModelConfig, transformer: ModelConfig) -> str | None:
    channels = transformer.get("in_channels"), transformer.get("out_channels")
    if channels[0] != channels[1] or transformer.get("ofs_embed_dim") is not None:
        return "makes videos from images, and only text-to-video models are run"
    return None


def _classes() -> Classes:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
    from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
    from prophy.training.objectives import VPrediction

    return Classes(
        transformer=CogVideoXTransformer3DModel,
        prophy_transformer=ProPhyCogVideoXTransformer3DModel,
        pipeline=ProPhyCogVideoXPipeline,
        vae=AutoencoderKLCogVideoX,
        objective=VPrediction,
    )


_LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

FAMILY = Family(
    vae_factors=lambda vae: (
        int(vae.get("temporal_compression_ratio", 4)),
        2 ** (len(vae["block_out_channels"]) - 1),
    ),
    latent_statistics=lambda vae: ([0.0], [1 / vae["scaling_factor"]]),
    patch_size=lambda transformer: (
        transformer.get("patch_size_t") or 1,
        transformer["patch_size"],
        transformer["patch_size"],
    ),
    text=lambda transformer, length: {"prompt_embeds": (length, transformer["text_embed_dim"])},
    pipelines=("CogVideoXPipeline", "ProPhyCogVideoXPipeline"),
    unsupported=_unsupported,
    classes=_classes,
    float32_vae=False,
    guides_in_one_pass=True,
    published={
        "zai-org/CogVideoX-2b": {},
        "zai-org/CogVideoX-5b": _LARGE,
        "zai-org/CogVideoX1.5-5B": {
            **_LARGE,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_frames": 81,
            "sample_height": 96,
            "sample_width": 170,
        },
    },
    published_vae={"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4},
    published_text_encoder=4_762_310_656,  # of T5 1.1 XXL
)
