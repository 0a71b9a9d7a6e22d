"""Which classes belong together, per family of video diffusion transformers, and where weights come from."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    ModelMixin,
    WanTransformer3DModel,
)
from huggingface_hub import snapshot_download

from prophy.errors import ProPhyError
from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.checkpoint import load_branch, trained_on
from prophy.models.physics_transformer import BRANCH, PhysicsTransformer
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.objectives import FlowMatching, Objective, VPrediction
from prophy.tiny import pipeline as tiny

Shape = tuple[int, int, int]
Config = Mapping[str, Any]

_ENCODERS = ("vae", "text_encoder", "tokenizer")  # components that encodings are made by


@dataclass(frozen=True)
class Backbone:
    """One family.

    Attributes:
        transformer: diffusers' class.
        prophy_transformer: ours, with a Physical Branch.
        pipeline: ours; it takes either transformer.
        vae: diffusers' class.
        objective: what the transformer is trained to predict.
        vae_factors: VAE's configuration -> how much it shrinks time and space.
        latent_statistics: VAE's configuration -> mean and standard deviation of latents, per channel or one.
        patch_size: transformer's configuration -> latents per token, (t, h, w).
    """

    transformer: type[ModelMixin]
    prophy_transformer: type[PhysicsTransformer]
    pipeline: type[DiffusionPipeline]
    vae: type[ModelMixin]
    objective: type[Objective]
    vae_factors: Callable[[Config], tuple[int, int]]
    latent_statistics: Callable[[Config], tuple[list[float], list[float]]]
    patch_size: Callable[[Config], Shape]

    def latent_shape(
        self, num_frames: int, height: int, width: int, vae_config: Config, transformer_config: Config
    ) -> Shape:
        """(T, H, W) of the latents of a clip: the first frame is encoded alone, then groups of frames.

        A transformer with patches in time gets its first patch filled up with copies of the first latent
        frame, as its pipeline makes room for them.

        Raises:
            ProPhyError: the VAE cannot encode clips of this length or size.
        """
        time, space = self.vae_factors(vae_config)
        patch_t = self.patch_size(transformer_config)[0]
        if num_frames % (time * patch_t) != 1 or height % space or width % space:
            raise ProPhyError(
                f"the VAE cannot encode {num_frames} frames of {height}x{width}; "
                f"take {time * patch_t} n + 1 frames, and multiples of {space} pixels"
            )
        return (num_frames - 1) // time + patch_t, height // space, width // space

    def token_grid(self, latent_shape: Shape, transformer_config: Config) -> Shape:
        """(T', H', W') of the tokens, one per patch.

        Raises:
            ProPhyError: the patches do not fill the latents.
        """
        patch_size = self.patch_size(transformer_config)
        if any(length % patch for length, patch in zip(latent_shape, patch_size, strict=True)):
            raise ProPhyError(
                f"latents of {tuple(latent_shape)} cannot be cut into patches of {patch_size}; "
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
        # Configurations of older diffusers leave these two out.
        vae_factors=lambda vae: (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)),
        latent_statistics=lambda vae: (vae["latents_mean"], vae["latents_std"]),
        patch_size=lambda transformer: tuple(transformer["patch_size"]),
    ),
    "cogvideox": Backbone(
        transformer=CogVideoXTransformer3DModel,
        prophy_transformer=ProPhyCogVideoXTransformer3DModel,
        pipeline=ProPhyCogVideoXPipeline,
        vae=AutoencoderKLCogVideoX,
        objective=VPrediction,
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
    ),
}


def resolve_pretrained(name: str) -> str:
    """A local folder or a hub id; "tiny" is the embedded pipeline, built on first use.

    Raises:
        ProPhyError: neither a folder nor the form of a hub id.
    """
    if name == "tiny":
        return str(tiny.pipeline_folder())
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
        return tiny.pipeline_fingerprint()
    path = Path(resolve_pretrained(pretrained))
    if path.is_dir():
        return _hash_of(path, path.rglob("*"))
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json"])).name
    except OSError:
        raise _unloadable(pretrained) from None


def pinned_revision(pretrained: str, revision: str | None) -> str | None:
    """The commit that `revision` of a hub id is now, so that all load the same; of a folder, itself.

    Raises:
        ProPhyError: there is no such model.
    """
    is_local = pretrained == "tiny" or Path(resolve_pretrained(pretrained)).is_dir()
    return revision if is_local else fingerprint(pretrained, revision)


def encoders_fingerprint(pretrained: str, revision: str | None) -> str:
    """As `fingerprint`, of what makes encodings: another transformer leaves it, except by a hub's commit.

    Raises:
        ProPhyError: there is no such model.
    """
    if pretrained == "tiny":
        return tiny.encoders_fingerprint()
    path = Path(resolve_pretrained(pretrained))
    if not path.is_dir():
        return fingerprint(pretrained, revision)
    return _hash_of(path, (file for part in _ENCODERS for file in (path / part).rglob("*")))


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


def check_unchanged(folder: Path, trained: Mapping[str, str | None], pretrained: str) -> None:
    """Checks that `pretrained`, at the revision of then, is what a checkpoint of training was trained on.

    Args:
        folder: of the checkpoint.
        trained: `name`, `revision` and `fingerprint` in it.
        pretrained: see `resolve_pretrained`.

    Raises:
        ProPhyError: there is no such model, or it is another one.
    """
    theirs, ours = trained["fingerprint"], fingerprint(pretrained, trained["revision"])
    if theirs != ours:
        raise ProPhyError(
            f"{folder} was trained on another backbone ({trained['name']}, fingerprint {theirs}) than "
            f"{pretrained} is now (fingerprint {ours}); set backbone.pretrained to that one, or choose "
            f"another run_dir"
        )


def shape_multiples(family: str, pretrained: str, revision: str | None) -> Shape:
    """What the (frames after the first, height, width) of a video must be multiples of; reads no weights.

    Raises:
        ProPhyError: there is no such model.
    """
    backbone = BACKBONES[family]
    vae_config, transformer_config = load_configs(family, pretrained, revision)
    time, space = backbone.vae_factors(vae_config)
    patch_t, patch_h, patch_w = backbone.patch_size(transformer_config)
    return time * patch_t, space * patch_h, space * patch_w


def load_configs(family: str, pretrained: str, revision: str | None) -> tuple[Config, Config]:
    """Configurations of VAE and transformer, as their files have them; reads no weights.

    Raises:
        ProPhyError: there is no such model.
    """
    backbone, path = BACKBONES[family], resolve_pretrained(pretrained)
    try:
        return (
            backbone.vae.load_config(path, subfolder="vae", revision=revision),
            backbone.transformer.load_config(path, subfolder="transformer", revision=revision),
        )
    except OSError:
        raise _unloadable(pretrained) from None


def download(pretrained: str, revision: str | None, parts: list[str] | None = None) -> Path:
    """The folder of a pretrained model; from the hub, each node fetches a file once (the hub's cache locks).

    Args:
        pretrained: see `resolve_pretrained`.
        revision: of a hub id.
        parts: patterns of the files that are needed; all if None.

    Raises:
        ProPhyError: there is no such model.
    """
    path = Path(resolve_pretrained(pretrained))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=parts))
    except OSError:
        raise _unloadable(pretrained) from None


def load_pipeline(
    family: str,
    pretrained: str,
    revision: str | None,
    dtype: torch.dtype,
    checkpoint: Path | None,
    **components: Any,
) -> DiffusionPipeline:
    """Loads a backbone's pipeline, with the branch of `checkpoint` if one is given.

    What the checkpoint holds of the backbone takes the place of what it was: an adapter is fused. The VAE
    stays in float32, as upstream recommends for Wan.

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
        if branch.lora is not None:
            transformer.add_lora(**branch.lora)
        missing, unexpected = transformer.load_state_dict(branch.state_dict, strict=False)
        assert not unexpected and not any(name.startswith(BRANCH) or "lora_" in name for name in missing)
        if branch.lora is not None:
            transformer.fuse_lora()
            transformer.unload_lora()
        pipeline.register_modules(transformer=transformer.eval())
    return pipeline


def _hash_of(folder: Path, files: Iterable[Path]) -> str:
    """Hash of the names and the content of files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        with file.open("rb") as content:
            digest.update(
                f"{file.relative_to(folder)} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def _unloadable(pretrained: str) -> ProPhyError:
    return ProPhyError(
        f"cannot load {pretrained}: no complete model of this name in a folder, in the local hub cache or on "
        f"the hub; check the name and the revision"
    )
