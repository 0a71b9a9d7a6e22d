"""Wan 2.1 and Wan 2.2 A14B, text or an image to video; Wan 2.2 TI2V, which is both in one."""

from collections.abc import Mapping

from prophy.backbones.families import (
    Classes,
    Expert,
    Family,
    Images,
    ModelConfig,
    Published,
    Shape,
    TextShapes,
)
from prophy.errors import ProPhyError
from prophy.models.description import ExpertName

_MASK = 4  # channels that say which frames are given
_IMAGE_TOKENS = 257  # of CLIP's ViT-H/14
_TEXT_TOKENS = 512  # as diffusers' attention has it


def _unsupported(pipeline: ModelConfig, transformer: ModelConfig) -> str | None:
    if transformer.get("pos_embed_seq_len") is not None:
        return "makes videos between a first and a last image (pos_embed_seq_len), and only a first is given"
    extra = transformer["in_channels"] - transformer["out_channels"]
    if extra not in (0, _MASK + transformer["out_channels"]):
        return f"reads {extra} channels beside the latents, which are not those of one image"
    if _has_two(pipeline) and pipeline.get("boundary_ratio") is None:
        return "has two transformers and no boundary_ratio, which says at which noise the second takes over"
    return None


def _has_two(pipeline: ModelConfig) -> bool:
    # [null, null] where the pipeline has the place, but no second transformer.
    return any(pipeline.get("transformer_2") or ())


def _experts(pipeline: ModelConfig) -> Mapping[ExpertName | None, Expert]:
    if not _has_two(pipeline):
        return {None: Expert()}
    boundary = pipeline["boundary_ratio"]
    return {
        "high_noise": Expert("transformer", (boundary, 1.0)),
        "low_noise": Expert("transformer_2", (0.0, boundary)),
    }


def _images(pipeline: ModelConfig, transformer: ModelConfig) -> Images:
    if transformer["in_channels"] != transformer["out_channels"]:
        return "always"
    return "first_latent" if pipeline.get("expand_timesteps") else "never"


def _image(transformer: ModelConfig, latents: Shape) -> TextShapes:
    if transformer["in_channels"] == transformer["out_channels"]:
        return {}
    shapes: TextShapes = {"image_latents": (transformer["out_channels"], *latents)}
    if transformer.get("image_dim") is not None:
        shapes["image_embeds"] = (_IMAGE_TOKENS, transformer["image_dim"])
    return shapes


def _text(transformer: ModelConfig, length: int) -> TextShapes:
    if transformer.get("image_dim") is not None and length != _TEXT_TOKENS:
        raise ProPhyError(
            f"a Wan that reads images tells {_TEXT_TOKENS} tokens of text from the image's by their number; "
            f"set backbone.max_sequence_length, which is {length}, to {_TEXT_TOKENS}"
        )
    return {"prompt_embeds": (length, transformer["text_dim"])}


def _classes() -> Classes:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from prophy.generation.pipeline_wan import ProPhyWanPipeline
    from prophy.generation.pipeline_wan_i2v import ProPhyWanImageToVideoPipeline
    from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
    from prophy.training.objectives import FlowMatching

    return Classes(
        transformer=WanTransformer3DModel,
        prophy_transformer=ProPhyWanTransformer3DModel,
        pipeline=ProPhyWanPipeline,
        vae=AutoencoderKLWan,
        objective=FlowMatching,
        image_pipeline=ProPhyWanImageToVideoPipeline,
    )


_VAE = {"scale_factor_temporal": 4, "scale_factor_spatial": 8}
_VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
_TWO = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}

FAMILY = Family(
    # Configurations of older diffusers leave these two out.
    vae_factors=lambda vae: (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)),
    latent_statistics=lambda vae: (vae["latents_mean"], vae["latents_std"]),
    patch_size=lambda transformer: tuple(transformer["patch_size"]),
    text=_text,
    pipelines=(
        "WanPipeline",
        "ProPhyWanPipeline",
        "WanImageToVideoPipeline",
        "ProPhyWanImageToVideoPipeline",
    ),
    unsupported=_unsupported,
    classes=_classes,
    images=_images,
    image=_image,
    experts=_experts,
    # Upstream repeats the embedding of one image.
    batches_images=lambda transformer: transformer.get("image_dim") is None,
    max_tokens=lambda transformer: transformer.get("rope_max_seq_len", 1024),
    encoders=("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"),
    supports_sea=True,
    published={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(
            _VAE, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
        ),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published(_VAE),
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": Published(
            _VAE, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
        ),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Published(
            _VAE_2_2,
            {
                "num_attention_heads": 24,
                "in_channels": 48,
                "out_channels": 48,
                "ffn_dim": 14336,
                "num_layers": 30,
            },
            {"expand_timesteps": True},
        ),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Published(_VAE, {}, {**_TWO, "boundary_ratio": 0.875}),
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": Published(
            _VAE, {"in_channels": 36}, {**_TWO, "boundary_ratio": 0.9}
        ),
    },
    published_text_encoder=5_680_910_336,  # of UMT5 XXL
)
