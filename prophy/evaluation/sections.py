"""The parts of a run's report: text, figures and pictures of what each step left behind."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prophy.evaluation.localization import localization_auroc
from prophy.evaluation.pictures import curves, heat_overlay, mp4_uri, png_uri
from prophy.evaluation.report import Picture, Section, Table
from prophy.models.control import PhysicsTrace
from prophy.sandbox import StoredClip, contact_sheet
from prophy.sheets import evenly, side_by_side
from prophy.taxonomy import index_of
from prophy.token_frames import Cells

SHOWN_CLIPS = 4
SHOWN_FRAMES = 8
SHOWN_CHARACTERS = 80


def clips_section(clips: Sequence[StoredClip]) -> Section:
    """Simulated clips with the outlines of their masks."""
    count = sum(len(clip.phenomena) for clip in clips)
    return Section(
        title="Simulated clips",
        text=f"{len(clips)} clips with {count} labelled phenomena. The outlines are the exact masks.",
        pictures=[
            Picture(
                uri=png_uri(contact_sheet(clips[: 2 * SHOWN_CLIPS])), caption="Frames of the first clips."
            )
        ],
    )


def raw_maps(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The VLM's maps in a row of the priors table, before any subtraction: `[T, H, W]` per phenomenon.

    Args:
        row: the table's.
        names: the table's phenomena, in its order.
    """
    maps = np.asarray(row["maps"], np.float32).reshape(row["maps_shape"])
    return {names[index]: map_ for index, map_ in zip(row["map_phenomena"], maps[:-1], strict=True)}


def priors_section(
    clips: Sequence[StoredClip], rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Section:
    """The VLM's raw maps over frames, and how well they find the masks.

    Args:
        clips: the truth.
        rows: the same clips' rows of the priors table.
        names: the table's phenomena, in its order.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for clip, row in zip(clips, rows, strict=True):
        for phenomenon, score in localization_auroc(raw_maps(row, names), clip.masks, "slices").items():
            scores[phenomenon].append(score)
    everything = [score for values in scores.values() for score in values]
    pictures = []
    for clip, row in list(zip(clips, rows, strict=True))[:SHOWN_CLIPS]:
        answers = {answer["question"]: answer["answer"] for answer in row["answers"]}
        for phenomenon, map_ in raw_maps(row, names).items():
            strip = _strip(clip.frames, map_, "slices")
            said = f"{phenomenon}; the VLM said: {textwrap.shorten(answers[phenomenon], SHOWN_CHARACTERS)!r}"
            pictures.append(Picture(uri=png_uri(strip), caption=said))
    return Section(
        title="Physics priors: where the VLM looks",
        text=f"Raw attention of each answer to the video, over {len(rows)} clips. AUROC against exact masks: "
        f"{np.mean(everything):.2f} on average over {len(everything)} maps (0.5 is chance).",
        table=Table(
            header=["phenomenon", "maps", "mean AUROC"],
            rows=[
                [name, str(len(scores[name])), f"{np.mean(scores[name]):.2f}"]
                for name in names
                if name in scores
            ],
        ),
        pictures=pictures,
    )


def training_section(metrics: Sequence[Mapping[str, float]], curves_of: Sequence[str]) -> Section:
    """Curves of the named metrics over the logged steps."""
    steps = [row["step"] for row in metrics]
    # A step with nothing to align has no such loss: a gap in the curve.
    series = {name: [row.get(name, math.nan) for row in metrics] for name in curves_of}
    last = metrics[-1]
    return Section(
        title="Training the Physical Branch",
        text=f"{last['step']:.0f} steps; the last took {last['step_time_s']:.2f} s, "
        f"that is {last['samples_per_s']:.1f} samples/s.",
        pictures=[Picture(uri=png_uri(curves(steps, series)), caption="Over the training steps.")],
    )


def routing_section(
    prompt: str, frames: np.ndarray, trace: PhysicsTrace, phenomena: Sequence[str]
) -> Section:
    """Where the refinement experts act in a generated video, and which semantic experts its prompt calls.

    Args:
        prompt: what was asked for.
        frames: the generated video, uint8 `[T, H, W, 3]`.
        trace: what its generation recorded.
        phenomena: those whose maps are shown, which the prompt names.
    """
    assert trace.phenomenon_maps is not None and trace.semantic_weights is not None
    weights = trace.semantic_weights[0].tolist()
    pictures = []
    for phenomenon in phenomena:
        map_ = trace.phenomenon_maps[0, ..., index_of(phenomenon, trace.phenomena)].numpy()
        caption = f"{phenomenon}: mean {map_.mean():.2f}, from {map_.min():.2f} to {map_.max():.2f}"
        pictures.append(Picture(uri=png_uri(_strip(frames, map_, "tokens")), caption=caption))
    shown = "for what the prompt names" if phenomena else "none here: the prompt names no phenomenon"
    return Section(
        title="Routing: which physics, and where",
        text=f"Prompt: {prompt!r}. Maps of the refinement router, mean over {trace.num_passes} denoising "
        f"steps, {shown}.",
        table=Table(
            header=[f"semantic expert {index}" for index in range(len(weights))],
            rows=[[f"{weight:.3f}" for weight in weights]],
        ),
        pictures=pictures,
    )


def videos_section(title: str, text: str, videos: Mapping[str, Path]) -> Section:
    """Videos with their prompts."""
    return Section(
        title=title,
        text=text,
        pictures=[Picture(uri=mp4_uri(path), caption=prompt) for prompt, path in videos.items()],
    )


def _strip(frames: np.ndarray, map_: np.ndarray, cells: Cells) -> np.ndarray:
    """Some frames in a row, under a map."""
    return side_by_side(evenly(heat_overlay(frames, map_, cells), SHOWN_FRAMES, scale=2))
