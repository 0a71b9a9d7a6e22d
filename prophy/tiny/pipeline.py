"""The embedded text-to-video pipeline: a small Wan stack of Wan's own classes.

17 frames of 64x64 become latents of 16x5x16x16 (VAE 4x in space and time) and 5x8x8 tokens. Text encoder, VAE
and transformer are those of `weights/`.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophy.tiny import build_once, bundled, part_sha256

if TYPE_CHECKING:  # who only asks for the fingerprint needs no torch, which takes seconds to import
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

MAX_SEQUENCE_LENGTH = 32

# fmt: off
VAE: dict[str, Any] = {
    "base_dim": 24,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    # Measured on simulated clips, so that latents have unit variance.
    "latents_mean": [
        0.02, 0.0, 0.1, -0.06, -0.07, -0.06, -0.16, 0.16,
        0.1, 0.01, -0.11, 0.24, -0.02, 0.01, 0.33, -0.06,
    ],
    "latents_std": [
        0.12, 0.1, 0.1, 0.16, 0.18, 0.18, 0.15, 0.1,
        0.12, 0.12, 0.09, 0.09, 0.14, 0.12, 0.22, 0.13,
    ],
    "scale_factor_spatial": 4,
}
# fmt: on
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "text_dim": 192,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
SCHEDULER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def pipeline_fingerprint() -> str:
    """What the pipeline is: the same on every machine, whatever the versions of the libraries."""
    parts = {
        "weights": part_sha256("vae") | part_sha256("transformer"),
        "text_encoder": part_sha256("text_encoder"),
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "scheduler": SCHEDULER,
    }
    return _hash_of(parts)


def encoders_fingerprint() -> str:
    """As `pipeline_fingerprint`, of VAE, text encoder and tokenizer alone."""
    return _hash_of({"vae": part_sha256("vae"), "text_encoder": part_sha256("text_encoder")})


def _hash_of(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pipeline_folder() -> Path:
    """The folder of the pipeline, in diffusers' layout."""
    return build_once("pipeline", f"{pipeline_fingerprint()}, of texts and images", _build)


def _build(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    text_encoder = bundled("text_encoder")
    write_pipeline(
        folder,
        AutoencoderKLWan.from_pretrained(bundled("vae"), dtype=torch.float32),
        AutoTokenizer.from_pretrained(text_encoder),
        UMT5EncoderModel.from_pretrained(text_encoder, dtype=torch.float32),
        WanTransformer3DModel.from_pretrained(bundled("transformer"), dtype=torch.float32),
    )


def write_pipeline(
    folder: Path,
    vae: "AutoencoderKLWan",
    tokenizer: "PreTrainedTokenizerBase",
    text_encoder: "UMT5EncoderModel",
    transformer: "WanTransformer3DModel",
) -> None:
    """Writes the pipeline of these, with the scheduler, in diffusers' layout.

    It is as Wan2.2-TI2V-5B's: the transformer takes a timestep for each token, and so a first frame.
    """
    from diffusers import UniPCMultistepScheduler

    from prophy.generation.pipeline_wan import ProPhyWanPipeline

    pipeline = ProPhyWanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        expand_timesteps=True,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )
    # A rank of a training may be the first on its node to want it; transformers saves on rank 0 alone.
    text_encoder.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[method-assign]
    pipeline.save_pretrained(folder)
