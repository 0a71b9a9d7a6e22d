"""Videos of two contestants side by side: the prompts at which one wins or loses most."""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import Config
from prophy.evaluation.pictures import mp4_uri
from prophy.evaluation.report import Picture, Section
from prophy.video import read_frames, write_video

logger = logging.getLogger(__name__)

_COUNTED = ("video: what", "video: what and where", "video: all right", "video: shape")
_GAP = 4  # white columns between two videos


def films_section(
    config: Config,
    contestants: tuple[str, str],
    scores: Sequence[Mapping[str, Any]],
    videos: Mapping[str, Mapping[str, Path]],
) -> list[Section]:
    """The largest losses and wins of the second against the first; none where no score differs.

    A prompt of which a video is no longer there is left out, and the log says how many.

    Args:
        config: the run.
        contestants: the first, and another.
        scores: all rows.
        videos: the file of each unit, for each contestant.
    """
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in scores:
        if row["measure"] in _COUNTED and row["contestant"] in contestants:
            totals[row["unit"]][row["contestant"]] += row["value"]
    first, second = contestants
    gains = {unit: total[second] - total[first] for unit, total in totals.items()}
    differ = [unit for unit in gains if gains[unit]]
    # Scores outlive videos, which someone may have removed to free the disk.
    there = [unit for unit in differ if all(videos[name][unit].exists() for name in contestants)]
    if len(there) < len(differ):
        logger.warning(
            "%d of %d prompts cannot be shown: their videos were removed",
            len(differ) - len(there),
            len(differ),
        )
    ranked = sorted(there, key=gains.__getitem__)
    shown = config.evaluate.shown
    losses = [unit for unit in ranked[: shown // 2] if gains[unit] < 0]
    wins = [unit for unit in ranked[::-1][: (shown + 1) // 2] if gains[unit] > 0]
    if not losses and not wins:
        return []
    pictures = [
        Picture(
            uri=_side_by_side(config, [videos[name][unit] for name in contestants]),
            caption=f"{second} {said}: {unit}",
        )
        for said, units in (("wins", wins), ("loses", losses))
        for unit in units
    ]
    return [
        Section(
            title=f"Side by side: {first} (left) and {second} (right)",
            text="The prompts at which they differ most, by what, where, colour and shape together. A few "
            "videos prove nothing.",
            pictures=pictures,
        )
    ]


def _side_by_side(config: Config, paths: Sequence[Path]) -> str:
    """Videos next to each other, as a `data:` URI."""
    backbone = config.backbone
    size = (backbone.num_frames, backbone.height, backbone.width)
    films = [read_frames(path, 0.0, (backbone.num_frames - 1) / backbone.fps, *size) for path in paths]
    between = np.full((*films[0].shape[:2], _GAP, 3), 255, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "both.mp4"
        write_video(path, np.concatenate([films[0], between, films[1]], 2), backbone.fps)
        return mp4_uri(path)
