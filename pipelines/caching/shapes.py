"""Which shapes clips get, and what that takes from their pictures.

A clip shows the centre of its video's picture, cut to the aspect ratio of the nearest shape of the VLM, which
sees this part as it is. The backbone gets it in the nearest of its own shapes. So both see the same, whatever
the backbone, and what is still stretched is bounded.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.picture import cut_share
from prophy.video import nearest_shape

# Circles that are stretched more are seen to be none, and what falls is too fast or too slow.
_MAX_STRETCH = 1.05
_SMALL = 0.01  # share of a picture's height or width that nobody misses

Shape = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Misfit:
    """Videos whose pictures are not of the shape that is made of them.

    Attributes:
        num_videos: how many lose, or are stretched by, more than a hundredth.
        worst: the one with the largest share.
        share: the part of its picture that is cut off, or by which it is stretched.
    """

    num_videos: int
    worst: str
    share: float


def check_shapes(config: Config) -> None:
    """Whether each shape of the VLM has one of the backbone with about its aspect ratio, and the reverse.

    Raises:
        ProPhyError: one has none.
    """
    sides = [("vlm", config.vlm.frame_shapes), ("backbone", config.backbone.frame_shapes)]
    for (name, shapes), (other, theirs) in (sides, sides[::-1]):
        for shape in shapes:
            nearest = nearest_shape(*shape, theirs)
            if (factor := stretch(shape, nearest)) > _MAX_STRETCH:
                raise ProPhyError(
                    f"{name} takes clips of {_size(shape)}, the nearest shape of {other} is "
                    f"{_size(nearest)}, which would stretch them {factor:.2f} times; set vlm.aspect_buckets "
                    f"and backbone.aspect_buckets so that each shape has one of its aspect ratio there"
                )


def stretch(shape: Shape, other: Shape) -> float:
    """How many times as wide, or as high, a picture of `shape` becomes in `other`; at least 1."""
    ratio = shape[1] / shape[0] * other[0] / other[1]
    return max(ratio, 1 / ratio)


def misfits(clips: pa.Table, config: Config) -> tuple[Misfit | None, Misfit | None]:
    """What the cached clips lose by being cut, and what they are stretched by; None where all fit.

    Args:
        clips: `source`, `height` and `width` of each, as in the priors.
        config: the shapes.
    """
    videos = clips.select(["height", "width"]).append_column("uri", pc.struct_field(clips["source"], "uri"))
    # Without threads, which would not keep the order. All clips of a video have its picture.
    videos = videos.group_by("uri", use_threads=False).aggregate([("height", "first"), ("width", "first")])
    sides = [videos[name].cast(pa.string()) for name in ("height_first", "width_first")]
    pictures = pc.binary_join_element_wise(*sides, " ").combine_chunks().dictionary_encode()
    cut, stretched = list[float](), list[float]()
    for text in pictures.dictionary.to_pylist():
        height, width = map(int, text.split())
        seen = nearest_shape(height, width, config.vlm.frame_shapes)
        cut.append(1 - min(cut_share(height, width, seen[1] / seen[0])))
        stretched.append(stretch(seen, nearest_shape(*seen, config.backbone.frame_shapes)) - 1)
    which = pictures.indices.to_numpy()
    return _worst(videos["uri"], np.array(cut)[which]), _worst(videos["uri"], np.array(stretched)[which])


def _worst(uris: pa.ChunkedArray, shares: np.ndarray) -> Misfit | None:
    above = int(np.count_nonzero(shares > _SMALL))
    if not above:
        return None
    worst = int(shares.argmax())
    return Misfit(above, uris[worst].as_py(), float(shares[worst]))


def _size(shape: Shape) -> str:
    return f"{shape[1]}x{shape[0]}"
