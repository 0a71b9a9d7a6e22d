"""The row callables that make videos for a comparison and judge them. They know nothing of Ray."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.actors import told_by_the_first_call
from pipelines.config import Config
from pipelines.evaluation.contestants import Entrant
from pipelines.evaluation.requests import requests_of, unit_of
from pipelines.evaluation.tables import score, whole_file, write_scores
from pipelines.generation.limits import check_same_model
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import VideoSpec
from prophy.evaluation.generated import Request
from prophy.evaluation.motion import measure_fall
from prophy.evaluation.semantics import ClipJudge
from prophy.evaluation.shapes import shape_iou
from prophy.sandbox import WORLD_M
from prophy.sandbox.scene import GRAVITY_M_S2
from prophy.video import read_frames, write_video

FALL = "bouncing_ball"


@told_by_the_first_call
class MakeVideos:
    """Row callable `{"entrant", "specs", "videos"}` -> `{"videos"}`: holds a model, writes mp4 files.

    Args:
        entrants: what is compared.
    """

    def __init__(self, entrants: Sequence[Entrant]) -> None:
        self._entrants = list(entrants)
        self._held: tuple[str, VideoSampler] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes a batch of videos."""
        entrant = self._entrants[row["entrant"]]
        if self._held is None or self._held[0] != entrant.model:
            self._held = None  # before the next is loaded
            check_same_model(entrant.config, entrant.model)
            self._held = entrant.model, VideoSampler(entrant.config)
        specs = [VideoSpec.model_validate_json(spec) for spec in row["specs"]]
        films = self._held[1].sample_batch(specs)
        for path, spec, frames in zip(map(Path, row["videos"]), specs, films, strict=True):
            with whole_file(path) as partial:
                write_video(partial, frames, spec.fps)
        return {"videos": row["videos"]}


@told_by_the_first_call
class JudgeVideos:
    """Row callable `{"requests", "videos", "path"}` -> `{"path"}`: writes the scores of a batch of videos.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        backbone = self._backbone = config.backbone
        self._requests = requests_of(config)
        self._judge = ClipJudge(backbone.num_frames, backbone.fps, backbone.height)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Judges a batch of videos."""
        backbone = self._backbone
        end_s = (backbone.num_frames - 1) / backbone.fps
        rows: list[dict[str, Any]] = []
        for index, path in zip(row["requests"], row["videos"], strict=True):
            frames = read_frames(path, 0.0, end_s, backbone.num_frames, backbone.height, backbone.width)
            rows += self._score(self._requests[index], frames)
        write_scores(Path(row["path"]), rows)
        return {"path": row["path"]}

    def _score(self, request: Request, frames: np.ndarray) -> Iterator[dict[str, Any]]:
        group = "one thing" if len(request.parts) == 1 else "two things"
        unit = unit_of(request)
        seen = {sighting.scene.phenomenon for sighting in self._judge.look(frames).values() if sighting}
        verdicts = self._judge.judge(frames, request.parts)
        for name, right in (
            ("what", [part.phenomenon in seen for part in request.parts]),
            ("what and where", [verdict.phenomenon for verdict in verdicts]),
            ("all right", [verdict.phenomenon and verdict.colour for verdict in verdicts]),
        ):
            # A video of two things is right where both are.
            yield score(f"video: {name}", group, unit, float(all(right)))
        yield score("video: shape", group, unit, shape_iou(frames, request.parts, self._backbone.fps))
        if request.parts[0].scene.name == FALL and len(request.parts) == 1:
            part = request.parts[0]
            fall = measure_fall(
                frames,
                colour=part.colour,
                side=part.side,
                fps=self._backbone.fps,
                pixels_per_m=frames.shape[1] / WORLD_M,
            )
            yield score("video: fall", "g within 30 %", unit, float(fall.obeys(GRAVITY_M_S2)))
            yield score("video: object", "frames with the ball", unit, fall.seen)
            yield score("video: object", "frames with more than one ball", unit, fall.split)
