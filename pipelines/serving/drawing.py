"""Draws what a video is asked for, and what an image is to it. Knows neither Ray nor HTTP."""

import io
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from prophy.images import fit_image, read_image
from prophy.taxonomy import index_of
from prophy.video import read_frames, write_video

MAX_SHEET_SIDE = 16_383
"""Pixels: what WebP can hold."""
MAX_PREVIEW_SIDE = 512
"""Pixels."""


def draw_overlay(video: bytes, maps: bytes, spec: VideoSpec, phenomenon: str) -> bytes:
    """Lays the map of one phenomenon over a video.

    Args:
        video: its mp4.
        maps: its `MAPS_FILE`.
        spec: what the video was asked to be.
        phenomenon: whose map.

    Returns:
        An mp4.

    Raises:
        ProPhyError: the video was made by a branch that does not know this phenomenon.
    """
    from prophy.evaluation.pictures import heat_overlay

    heat = _map_of(phenomenon, maps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        write_video(path, heat_overlay(_frames(video, spec), heat, "tokens"), spec.fps)
        return path.read_bytes()


def draw_layer(maps: bytes, spec: VideoSpec, phenomenon: str) -> bytes:
    """Draws what `draw_overlay` lays over a video, on the grid of its tokens, for who lays it over elsewhere.

    The arguments and the error are those of `draw_overlay`.

    Returns:
        A PNG with one picture a frame, as in `draw_spritesheet`, whose opacity is that of the map.
    """
    from prophy.evaluation.pictures import heat_layer

    heat = _map_of(phenomenon, maps)
    pictures = heat_layer(heat, (spec.num_frames, *heat.shape[1:]), "tokens")
    return _save(_on_one_sheet([Image.fromarray(picture) for picture in pictures]), "png")


def draw_spritesheet(video: bytes, spec: VideoSpec) -> bytes:
    """Puts all frames of a video into one picture, row by row, in `ceil(sqrt(num_frames))` columns.

    Frames are made smaller where the picture would be larger than WebP allows.

    Returns:
        A WebP.
    """
    frames = _frames(video, spec)
    columns = _num_columns(len(frames))
    rows = -(-len(frames) // columns)
    shrink = max(1.0, columns * spec.width / MAX_SHEET_SIDE, rows * spec.height / MAX_SHEET_SIDE)
    size = int(spec.width / shrink), int(spec.height / shrink)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BOX) for frame in frames]
    return _save(_on_one_sheet(pictures), "webp", quality=95, method=2)


def draw_preview(image: bytes, height: int, width: int) -> bytes:
    """Draws what a video of this size begins with: an image as it is cut and scaled, or smaller.

    Args:
        image: the file that a client sent.
        height: the video's, in pixels.
        width: the video's, in pixels.

    Returns:
        A WebP.

    Raises:
        ProPhyError: it is no image, or not one that is taken.
    """
    preview = Image.fromarray(fit_image(read_image(image, "the image"), height, width))
    preview.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
    return _save(preview, "webp", quality=90)


def _on_one_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    columns = _num_columns(len(pictures))
    width, height = pictures[0].size
    sheet = Image.new(pictures[0].mode, (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def _num_columns(num_pictures: int) -> int:
    return math.ceil(math.sqrt(num_pictures))


def _save(sheet: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, kind, **options)
    return buffer.getvalue()


def _map_of(phenomenon: str, maps: bytes) -> np.ndarray:
    """The map of one phenomenon in a `MAPS_FILE`, float32 on the grid of tokens."""
    by_name = json.loads(maps)["maps"]
    return np.array([*by_name.values()][index_of(phenomenon, [*by_name])], np.float32)


def _frames(video: bytes, spec: VideoSpec) -> np.ndarray:
    """All frames, uint8 `[T, H, W, 3]`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        path.write_bytes(video)
        end_s = (spec.num_frames - 1) / spec.fps
        return read_frames(path, 0.0, end_s, spec.num_frames, spec.height, spec.width)
