"""What making and encoding videos takes of a GPU, before a weight is fetched. Reads configurations alone."""

from dataclasses import dataclass, replace

import torch

from pipelines.config import BackboneConfig, ServeConfig
from prophy.backbones.families import FAMILIES, ModelConfig
from prophy.backbones.memory import VaeCost, vae_cost
from prophy.backbones.pretrained import download, is_hub_id


@dataclass(frozen=True)
class Footprint:
    """Bytes of a GPU that makes one video at a time, and of one that encodes one clip at a time.

    Attributes:
        processes_per_replica: how many GPUs share a served video; each takes what is counted here.
        num_transformers: how many are held.
        transformers: weights of backbone and branch, as `backbone.offload` and `.storage_dtype` leave them.
        text_encoder: its weights, 0 where they wait in the host's memory; None where their size is not known
            without a download.
        vae: its weights, and what encoding and decoding take beside them.
        denoising: what a step takes beside the weights; an estimate.
    """

    processes_per_replica: int
    num_transformers: int
    transformers: int
    text_encoder: int | None
    vae: VaeCost
    denoising: int

    @property
    def serving(self) -> int:
        """All of a replica: denoising and decoding follow each other."""
        held = self.transformers + (self.text_encoder or 0) + self.vae.weights
        return held + max(self.denoising, self.vae.decode)

    @property
    def encoding(self) -> int:
        """All of an actor of `cache.encode`."""
        return (self.text_encoder or 0) + self.vae.weights + self.vae.encode


def footprint(
    backbone: BackboneConfig,
    vae_config: ModelConfig,
    cached: tuple[int, int, int],
    *,
    serve: ServeConfig,
    num_transformers: int,
    num_blocks: int,
    backbone_parameters: int,
    branch_parameters: int,
    block_bytes: int,
    token_bytes: int,
    num_physical_blocks: int,
) -> Footprint:
    """Counts it for videos of the configuration's size.

    Args:
        backbone: the configuration.
        vae_config: the VAE's configuration.
        cached: frames, height and width of the largest clip that is encoded.
        serve: how many GPUs share a served video, and how.
        num_transformers: how many there are.
        num_blocks: blocks of one.
        backbone_parameters: parameters of one, without its branch.
        branch_parameters: parameters of its branch.
        block_bytes: what the inside of one block keeps for a video's backward pass, in bfloat16: more than
            it takes where there is none.
        token_bytes: the tokens of a video, in bfloat16.
        num_physical_blocks: their residuals are held until the backbone's blocks take them.
    """
    family = FAMILIES[backbone.family]
    item = getattr(torch, backbone.dtype).itemsize
    passes = 2 if family.guides_in_one_pass and not serve.cfg_parallel else 1
    shape = (backbone.num_frames, backbone.height, backbone.width)
    vae = vae_cost(family, vae_config, shape, 4 if family.float32_vae else item)
    if cached != shape:
        of_clip = vae_cost(family, vae_config, cached, 4 if family.float32_vae else item)
        vae = replace(vae, encode=of_clip.encode, encode_flops=of_clip.encode_flops)
    weights = backbone_parameters * (1 if backbone.storage_dtype is not None else item)
    branch = branch_parameters * item
    held = num_transformers * (weights + branch)
    if backbone.offload == "all":  # a block computes while the next one comes
        held = 2 * weights // num_blocks + branch
    return Footprint(
        processes_per_replica=serve.processes_per_replica,
        num_transformers=num_transformers,
        transformers=held,
        text_encoder=0 if backbone.offload != "none" else _text_encoder_bytes(backbone, item),
        vae=vae,
        denoising=passes
        * (block_bytes + (num_physical_blocks + 1) * token_bytes)
        * item
        // (2 * serve.sequence_parallel),
    )


def _text_encoder_bytes(backbone: BackboneConfig, item: int) -> int | None:
    family = FAMILIES[backbone.family]
    if backbone.pretrained in family.published:
        return family.published_text_encoder * item
    if is_hub_id(backbone.pretrained):
        return None
    folder = download(backbone.pretrained, backbone.revision) / "text_encoder"
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
