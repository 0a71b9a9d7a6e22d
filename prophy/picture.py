"""A decoded frame as the picture that is shown: square pixels, upright, not mirrored, in a screen's range.

Colours of the usual dynamic range are converted by matrix and range alone. What was recorded in high dynamic
range (PQ or HLG, as newer telephones do) is tone-mapped to BT.709 by FFmpeg's scaler (perceptual intent).
"""

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc, Interpolation

from prophy.frames import Layout, VideoError, source_of

_HIGH_DYNAMIC_RANGE = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
_LEVEL = 0.02  # sine of about one degree; FFmpeg takes no notice of less either


def shown_size(path: str | Path, frame: VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Height and width of the picture that a frame shows.

    Args:
        path: the file, for the error.
        frame: as decoded.
        pixel_aspect: width of a stored pixel over its height; None is square.

    Raises:
        VideoError: it is to be shown askew.
    """
    height, width = frame.height, max(round(frame.width * (pixel_aspect or 1)), 1)
    return (width, height) if _orientation(frame, path).is_transposed else (height, width)


def cut_share(height: int, width: int, aspect_ratio: float) -> tuple[float, float]:
    """The shares of a picture's height and width that are left at its centre when cut to `aspect_ratio`.

    Args:
        height: the picture's, in pixels.
        width: the picture's, in pixels.
        aspect_ratio: width over height of what is left.
    """
    wider = aspect_ratio * height / width
    return min(1 / wider, 1.0), min(wider, 1.0)


class PictureMaker:
    """Makes RGB pictures of one size from the frames of one video.

    Args:
        path: the file, for errors.
        height: height of every picture, in pixels.
        width: width of every picture, in pixels.
        pixel_aspect: width of a stored pixel over its height; None is square.
        aspect_ratio: width over height of the part at the centre that is scaled to the picture; None is the
            whole.
    """

    def __init__(
        self,
        path: str | Path,
        height: int,
        width: int,
        pixel_aspect: Fraction | None,
        aspect_ratio: float | None,
    ) -> None:
        self.path = path
        self.height, self.width = height, width
        self.pixel_aspect, self.aspect_ratio = pixel_aspect, aspect_ratio

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """The picture, uint8 `[height, width, 3]`.

        Raises:
            VideoError: it is to be shown askew.
        """
        whole_height, whole_width = self.height, self.width
        if self.aspect_ratio is not None:
            shares = cut_share(*shown_size(self.path, frame, self.pixel_aspect), self.aspect_ratio)
            whole_height, whole_width = round(self.height / shares[0]), round(self.width / shares[1])
        turn = _orientation(frame, self.path)
        stored = (whole_width, whole_height) if turn.is_transposed else (whole_height, whole_width)
        picture = turn(self._scaled(frame, *stored))
        top, left = (whole_height - self.height) // 2, (whole_width - self.width) // 2
        return picture[top : top + self.height, left : left + self.width]

    def _scaled(self, frame: VideoFrame, height: int, width: int) -> np.ndarray:
        if frame.color_trc in _HIGH_DYNAMIC_RANGE:
            return _tone_mapped(frame, height, width)
        # One thread: there are as many decoding processes as are wanted.
        return frame.to_ndarray(
            width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )


def _tone_mapped(frame: VideoFrame, height: int, width: int) -> np.ndarray:
    scaled = frame.reformat(width=width, height=height, interpolation=Interpolation.BICUBIC, threads=1)
    graph = _tone_mapper(frame.color_trc, Layout.of(scaled))
    graph.vpush(scaled)
    return graph.vpull().to_ndarray()


@functools.lru_cache(maxsize=8)
def _tone_mapper(color_trc: int, layout: Layout) -> Graph:
    """A filter for frames of one kind; kept, since FFmpeg takes seconds to make its table of colours."""
    graph = Graph()
    graph.threads = 1
    graph.link_nodes(
        source_of(graph, layout),
        graph.add("scale", "out_transfer=bt709:out_primaries=bt709:intent=perceptual"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph


class _Orientation(NamedTuple):
    """What makes a stored picture the shown one: transposed or not, then read in these steps."""

    is_transposed: bool
    row_step: int
    column_step: int

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        upright = picture.swapaxes(0, 1) if self.is_transposed else picture
        return upright[:: self.row_step, :: self.column_step]


def _orientation(frame: VideoFrame, path: str | Path) -> _Orientation:
    """By the frame's display matrix, `[[a, b, u], [c, d, v], [x, y, w]]`: (p, q) goes to (ap+cq, bp+dq)."""
    side_data = cast(Mapping[SideDataType, SideData], frame.side_data)
    if SideDataType.DISPLAYMATRIX not in side_data:
        return _Orientation(False, 1, 1)
    matrix = np.frombuffer(bytes(side_data[SideDataType.DISPLAYMATRIX]), np.int32)
    a, b, c, d = (float(number) for number in matrix[[0, 1, 3, 4]])
    straight, crossed = math.hypot(a, d), math.hypot(b, c)
    if min(straight, crossed) > _LEVEL * max(straight, crossed):
        raise VideoError(f"{path} is to be shown turned by no quarter of a circle; write it anew, upright")
    is_transposed = crossed > straight
    down, right = (b, c) if is_transposed else (d, a)
    return _Orientation(is_transposed, -1 if down < 0 else 1, -1 if right < 0 else 1)
