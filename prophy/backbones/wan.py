"""Wan 2.1, text to video."""

from prophy.backbones.families import Classes, Family, ModelConfig


def _unsupported(pipeline: ModelConfig, transformer: ModelConfig) -> str | None:
    if transformer.get("image_dim") is not None or transformer.get("in_channels") != transformer.get(
        "out_channels"
    ):
        return "makes videos from images, and only text-to-video models are run"
    # [null, null] where the pipeline has the place, but no second transformer.
    if any(pipeline.get("transformer_2") or ()):
        return (
            "has two transformers (transformer_2, as Wan2.2-A14B), and the Physical Branch would act in one "
            "of them only"
        )
    if pipeline.get("expand_timesteps"):
        return (
            "gives each token a timestep of its own (expand_timesteps, as Wan2.2-TI2V-5B), which the "
            "transformer with a Physical Branch does not take"
        )
    return None


def _classes() -> Classes:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from prophy.generation.pipeline_wan import ProPhyWanPipeline
    from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
    from prophy.training.objectives import FlowMatching

    return Classes(
        transformer=WanTransformer3DModel,
        prophy_transformer=ProPhyWanTransformer3DModel,
        pipeline=ProPhyWanPipeline,
        vae=AutoencoderKLWan,
        objective=FlowMatching,
    )


FAMILY = Family(
    # Configurations of older diffusers leave these two out.
    vae_factors=lambda vae: (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)),
    latent_statistics=lambda vae: (vae["latents_mean"], vae["latents_std"]),
    patch_size=lambda transformer: tuple(transformer["patch_size"]),
    text=lambda transformer, length: {"prompt_embeds": (length, transformer["text_dim"])},
    pipelines=("WanPipeline", "ProPhyWanPipeline"),
    unsupported=_unsupported,
    classes=_classes,
    supports_sea=True,
    published={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": {},
    },
    published_vae={"scale_factor_temporal": 4, "scale_factor_spatial": 8},
    published_text_encoder=5_680_910_336,  # of UMT5 XXL
)
