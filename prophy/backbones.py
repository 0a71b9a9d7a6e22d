"""Which classes belong together, per family of video diffusion transformers, and where weights come from."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, ModelMixin, WanTransformer3DModel
from huggingface_hub import snapshot_download

from prophy.errors import ProPhyError
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.checkpoint import load_branch, trained_on
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.objectives import FlowMatching
from prophy.tiny.pipeline import pipeline_fingerprint, pipeline_folder

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Backbone:
    """One family.

    Attributes:
        transformer: diffusers' class.
        prophy_transformer: ours, with a Physical Branch.
        pipeline: ours; it takes either transformer.
        vae: diffusers' class.
        objective: what the transformer is trained to predict.
        latent_shape: (num_frames, height, width, VAE's configuration) -> (T, H, W) of the latents.
        token_grid: ((T, H, W) of the latents, transformer's configuration) -> (T', H', W') of the tokens.
    """

    transformer: type[ModelMixin]
    prophy_transformer: type[ProPhyWanTransformer3DModel]
    pipeline: type[DiffusionPipeline]
    vae: type[ModelMixin]
    objective: type[FlowMatching]
    latent_shape: Callable[[int, int, int, Mapping[str, Any]], Shape]
    token_grid: Callable[[Shape, Mapping[str, Any]], Shape]


def _wan_latent_shape(num_frames: int, height: int, width: int, vae_config: Mapping[str, Any]) -> Shape:
    """The first frame is encoded alone, then groups of frames.

    Raises:
        ProPhyError: the VAE cannot encode clips of this length or size.
    """
    # Configurations of older diffusers leave these two out.
    time, space = vae_config.get("scale_factor_temporal", 4), vae_config.get("scale_factor_spatial", 8)
    if num_frames % time != 1 or height % space or width % space:
        raise ProPhyError(
            f"the VAE cannot encode {num_frames} frames of {height}x{width}; "
            f"take {time} n + 1 frames, and multiples of {space} pixels"
        )
    return (num_frames - 1) // time + 1, height // space, width // space


def _wan_token_grid(latent_shape: Shape, transformer_config: Mapping[str, Any]) -> Shape:
    """One token per patch.

    Raises:
        ProPhyError: the patches do not fill the latents.
    """
    patch_size = transformer_config["patch_size"]
    if any(length % patch for length, patch in zip(latent_shape, patch_size, strict=True)):
        raise ProPhyError(
            f"latents of {tuple(latent_shape)} cannot be cut into patches of {tuple(patch_size)}; "
            f"change num_frames, height or width"
        )
    t, h, w = (length // patch for length, patch in zip(latent_shape, patch_size, strict=True))
    return t, h, w


BACKBONES: dict[str, Backbone] = {
    "wan": Backbone(
        transformer=WanTransformer3DModel,
        prophy_transformer=ProPhyWanTransformer3DModel,
        pipeline=ProPhyWanPipeline,
        vae=AutoencoderKLWan,
        objective=FlowMatching,
        latent_shape=_wan_latent_shape,
        token_grid=_wan_token_grid,
    )
}


def resolve_pretrained(name: str) -> str:
    """A local folder or a hub id; "tiny" is the embedded pipeline, built on first use.

    Raises:
        ProPhyError: neither a folder nor the form of a hub id.
    """
    if name == "tiny":
        return str(pipeline_folder())
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ProPhyError(
            f"no folder {name}; give a folder, a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or tiny"
        )
    return name


def fingerprint(pretrained: str, revision: str | None) -> str:
    """What a pretrained model is, whatever its name: a hash of a folder's files, or the commit on the hub.

    Raises:
        ProPhyError: there is no such model.
    """
    if pretrained == "tiny":
        return pipeline_fingerprint()
    path = Path(resolve_pretrained(pretrained))
    if not path.is_dir():
        try:
            return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json"])).name
        except OSError:
            raise _unloadable(pretrained) from None
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            digest.update(
                f"{file.relative_to(path)} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def check_checkpoint(checkpoint: Path, pretrained: str, revision: str | None) -> None:
    """Checks that a branch was trained on this backbone; reads no weights of the branch.

    Raises:
        ProPhyError: there is no such checkpoint, or it belongs to another backbone.
    """
    backbone = trained_on(checkpoint)
    if backbone["fingerprint"] != fingerprint(pretrained, revision):
        raise ProPhyError(
            f"{checkpoint} was trained on another backbone ({backbone['name']}) than {pretrained}; "
            f"set backbone.pretrained to that one, or choose another checkpoint"
        )


def shape_multiples(family: str, pretrained: str, revision: str | None) -> Shape:
    """What the (frames after the first, height, width) of a video must be multiples of; reads no weights.

    Raises:
        ProPhyError: there is no such model.
    """
    backbone, path = BACKBONES[family], resolve_pretrained(pretrained)
    try:
        vae_config = backbone.vae.load_config(path, subfolder="vae", revision=revision)
        transformer_config = backbone.transformer.load_config(
            path, subfolder="transformer", revision=revision
        )
    except OSError:
        raise _unloadable(pretrained) from None
    with torch.device("meta"):  # built for what the file leaves to defaults
        vae = backbone.vae.from_config(vae_config).config
    time, height, width = transformer_config["patch_size"]
    space = vae["scale_factor_spatial"]
    return time * vae["scale_factor_temporal"], height * space, width * space


def load_pipeline(
    family: str,
    pretrained: str,
    revision: str | None,
    dtype: torch.dtype,
    checkpoint: Path | None,
    **components: Any,
) -> DiffusionPipeline:
    """Loads a backbone's pipeline, with the branch of `checkpoint` if one is given.

    The VAE stays in float32, as upstream recommends for Wan.

    Args:
        family: key of `BACKBONES`.
        pretrained: see `resolve_pretrained`.
        revision: of a hub id.
        dtype: of transformer and text encoder.
        checkpoint: folder that `save_branch` wrote.
        components: components to use instead of the pretrained ones; None leaves one out.

    Raises:
        ProPhyError: there is no such model or checkpoint, or the checkpoint belongs to another backbone.
    """
    backbone = BACKBONES[family]
    if checkpoint is not None:
        check_checkpoint(checkpoint, pretrained, revision)
    branch = None if checkpoint is None else load_branch(checkpoint)
    try:
        pipeline = backbone.pipeline.from_pretrained(
            resolve_pretrained(pretrained),
            revision=revision,
            dtype={"default": dtype, "vae": torch.float32},
            **components,
        )
    except OSError:
        raise _unloadable(pretrained) from None
    if branch is not None:
        transformer = backbone.prophy_transformer.from_transformer(pipeline.transformer, **branch.physics)
        transformer.physics_branch.load_state_dict(branch.state_dict)
        pipeline.register_modules(transformer=transformer.eval())
    return pipeline


def _unloadable(pretrained: str) -> ProPhyError:
    return ProPhyError(
        f"cannot load {pretrained}: no complete model of this name in a folder, in the local hub cache or on "
        f"the hub; check the name and the revision"
    )
