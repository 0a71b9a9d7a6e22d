"""Draws what a finished video is asked for. Knows neither Ray nor HTTP."""

import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from prophy.taxonomy import index_of
from prophy.video import read_frames, write_video

MAX_SHEET_SIDE = 16_383
"""Pixels: what WebP can hold."""


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

    by_name = json.loads(maps)["maps"]
    heat = np.array([*by_name.values()][index_of(phenomenon, [*by_name])], np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        write_video(path, heat_overlay(_frames(video, spec), heat), spec.fps)
        return path.read_bytes()


def draw_spritesheet(video: bytes, spec: VideoSpec) -> bytes:
    """Puts all frames of a video into one picture, row by row, in `ceil(sqrt(num_frames))` columns.

    Frames are made smaller where the picture would be larger than WebP allows.

    Returns:
        A WebP.
    """
    frames = _frames(video, spec)
    columns = math.ceil(math.sqrt(len(frames)))
    rows = -(-len(frames) // columns)
    shrink = max(1.0, columns * spec.width / MAX_SHEET_SIDE, rows * spec.height / MAX_SHEET_SIDE)
    width, height = int(spec.width / shrink), int(spec.height / shrink)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)
        sheet.paste(picture, (index % columns * width, index // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "webp", quality=95, method=2)
    return buffer.getvalue()


def _frames(video: bytes, spec: VideoSpec) -> np.ndarray:
    """All frames, uint8 `[T, H, W, 3]`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        path.write_bytes(video)
        end_s = (spec.num_frames - 1) / spec.fps
        return read_frames(path, 0.0, end_s, spec.num_frames, spec.height, spec.width)
