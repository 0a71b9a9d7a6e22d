"""What a VAE takes of a GPU, counted on tensors that take no memory."""

import weakref
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from prophy.backbones.families import Family, ModelConfig, Shape

_FLOAT32 = 4


@dataclass(frozen=True)
class VaeCost:
    """What a VAE takes for one clip.

    Attributes:
        weights: bytes of its parameters.
        encode: most bytes that encoding holds at a time, without weights.
        decode: likewise.
        encode_flops: operations of encoding.
    """

    weights: int
    encode: int
    decode: int
    encode_flops: int


def vae_cost(family: Family, config: ModelConfig, shape: Shape, bytes_per_number: int) -> VaeCost:
    """Counts the memory of a VAE as `load_pipeline` runs it: whole frames, or tiles where they are large.

    Args:
        family: the backbone's.
        config: the VAE's; what it leaves out is the default of its class.
        shape: frames, height and width of a clip.
        bytes_per_number: 4 for float32, 2 for bfloat16.
    """
    num_frames, height, width = shape
    time, space = family.vae_factors(config)
    with FakeTensorMode(), torch.no_grad():
        vae: Any = family.classes().vae.from_config(dict(config))
        limit = (height, width) if family.float32_vae else (vae.config.sample_height, vae.config.sample_width)
        tile = tuple(min(whole, most) for whole, most in zip((height, width), limit, strict=True))
        channels = getattr(vae.config, "z_dim", None) or vae.config.latent_channels
        flops = []
        # It works on a few frames at a time. After the second group each takes what the one before took, and
        # only the video and its latents grow.
        group = getattr(vae, "num_sample_frames_batch_size", time)
        shorter, probed = 1 + group, 1 + 2 * group
        for frames in (shorter, probed):
            video = torch.empty(1, 3, frames, *tile)
            counter = FlopCounterMode(display=False)
            with counter, _PeakOfStorages() as encoding:
                vae.encode(video)
            flops.append(counter.get_total_flops())
        latents = torch.empty(1, channels, 1 + (probed - 1) // time, *(length // space for length in tile))
        with _PeakOfStorages() as decoding:
            vae.decode(latents)
        weights = sum(parameter.numel() for parameter in vae.parameters())
    if tile == (height, width):
        whole = 3 * (num_frames - probed) * height * width * _FLOAT32
        pixels = 1.0
    else:
        # The tiles of a video, which overlap, before they are put together, and after.
        pixels = prod(
            _covered(length, part) / length for length, part in zip((height, width), tile, strict=True)
        )
        whole = round(3 * num_frames * height * width * _FLOAT32 * (1 + pixels))
        pixels *= height * width / prod(tile)
    encode_flops = flops[1] + (flops[1] - flops[0]) * (num_frames - probed) / group
    encode, decode = (
        bytes_per_number * (peak + whole) // _FLOAT32 for peak in (encoding.peak, decoding.peak)
    )
    return VaeCost(weights * bytes_per_number, encode, decode, round(encode_flops * pixels))


def _covered(length: int, tile: int, overlap: float = 0.2) -> int:
    """Pixels of all tiles along one side; diffusers lets them overlap by a sixth or a fifth."""
    step = round(tile * (1 - overlap))
    return sum(min(tile, length - start) for start in range(0, ceil(length / step) * step, step))


class _PeakOfStorages(TorchDispatchMode):
    """Most bytes that tensors made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
