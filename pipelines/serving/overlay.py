"""Draws where a phenomenon acts over a finished video. Knows neither Ray nor HTTP; imports torch."""

import json
import tempfile
from pathlib import Path

import numpy as np

from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from prophy.evaluation.pictures import heat_overlay
from prophy.taxonomy import Phenomenon
from prophy.video import read_frames, write_video


def draw_overlay(video: bytes, maps: bytes, spec: VideoSpec, phenomenon: Phenomenon) -> bytes:
    """An mp4 as bright as the phenomenon's map says.

    Args:
        video: the mp4.
        maps: its `MAPS_FILE`.
        spec: of the video.
        phenomenon: whose map.
    """
    heat = np.array(json.loads(maps)["maps"][phenomenon], np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        path.write_bytes(video)
        end_s = (spec.num_frames - 1) / spec.fps
        frames = read_frames(path, 0.0, end_s, spec.num_frames, spec.height, spec.width)
        write_video(path, heat_overlay(frames, heat), spec.fps)
        return path.read_bytes()
