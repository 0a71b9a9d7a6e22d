"""CogVideoX 1.0 and 1.5, text or an image to video."""

from prophy.backbones.families import Classes, Family, Images, ModelConfig, Published, Shape, TextShapes
from prophy.errors import ProPhyError


def _unsupported(pipeline: ModelConfig, transformer: ModelConfig) -> str | None:
    extra = transformer["in_channels"] - transformer["out_channels"]
    if extra not in (0, transformer["out_channels"]):
        return f"reads {extra} channels beside the latents, which are not those of one image"
    return None


def _only_latents(transformer: ModelConfig) -> Shape | None:
    if not transformer.get("use_learned_positional_embeddings"):
        return None
    # Of another length diffusers would compute positions that the model never saw, without a word.
    frames, factor = transformer.get("sample_frames", 49), transformer.get("temporal_compression_ratio", 4)
    height, width = transformer.get("sample_height", 60), transformer.get("sample_width", 90)
    return (frames - 1) // factor + 1, height, width


def _text(transformer: ModelConfig, length: int) -> TextShapes:
    places = transformer.get("max_text_seq_length", 226)
    adds_positions = not transformer.get("use_rotary_positional_embeddings") or transformer.get(
        "use_learned_positional_embeddings"
    )
    if adds_positions and length != places:
        raise ProPhyError(
            f"this CogVideoX adds positions to {places} tokens of text, no more and no fewer; set "
            f"backbone.max_sequence_length, which is {length}, to {places}"
        )
    return {"prompt_embeds": (length, transformer["text_embed_dim"])}


def _images(pipeline: ModelConfig, transformer: ModelConfig) -> Images:
    return "never" if transformer["in_channels"] == transformer["out_channels"] else "always"


def _image(transformer: ModelConfig, latents: Shape) -> TextShapes:
    if transformer["in_channels"] == transformer["out_channels"]:
        return {}
    return {"image_latents": (transformer["out_channels"], 1, *latents[1:])}


def _classes() -> Classes:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
    from prophy.generation.pipeline_cogvideox_i2v import ProPhyCogVideoXImageToVideoPipeline
    from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
    from prophy.training.objectives import VPrediction

    return Classes(
        transformer=CogVideoXTransformer3DModel,
        prophy_transformer=ProPhyCogVideoXTransformer3DModel,
        pipeline=ProPhyCogVideoXPipeline,
        vae=AutoencoderKLCogVideoX,
        objective=VPrediction,
        image_pipeline=ProPhyCogVideoXImageToVideoPipeline,
    )


_VAE = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
_LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_LARGE_1_5 = {
    **_LARGE,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
}

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
    text=_text,
    pipelines=(
        "CogVideoXPipeline",
        "ProPhyCogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "ProPhyCogVideoXImageToVideoPipeline",
    ),
    unsupported=_unsupported,
    classes=_classes,
    float32_vae=False,
    guides_in_one_pass=True,
    has_text_stream=True,
    only_latents=_only_latents,
    images=_images,
    image=_image,
    published={
        "zai-org/CogVideoX-2b": Published(_VAE),
        "zai-org/CogVideoX-5b": Published(_VAE, _LARGE),
        "zai-org/CogVideoX-5b-I2V": Published(
            _VAE, {**_LARGE, "in_channels": 32, "use_learned_positional_embeddings": True}
        ),
        "zai-org/CogVideoX1.5-5B": Published(_VAE, _LARGE_1_5),
        "zai-org/CogVideoX1.5-5B-I2V": Published(
            _VAE, {**_LARGE_1_5, "in_channels": 32, "ofs_embed_dim": 512}
        ),
    },
    published_text_encoder=4_762_310_656,  # of T5 1.1 XXL
)
