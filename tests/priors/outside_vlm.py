"""A VLM as another package would add it: of a kind that transformers does not know, with slices of its own.

It looks where the picture moves. Its slices are the first frame alone, then as many frames as its
`config.json` says, the last slice with what is left. Nothing of it is in the product's package:
`test_outside_vlm.py` plugs in `OutsideVlm` by an entry point.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from prophy.errors import ProPhyError
from prophy.priors.questionnaire import BACKGROUND, CAPTION, ask_presence
from prophy.priors.vlm import Answer, SliceTimes
from tests.wisa import WISA

CELL = 16  # pixels
SAID = {CAPTION.text: "something moves", ask_presence(WISA).text: "collision", BACKGROUND.text: ""}


@dataclass(frozen=True)
class Watched:
    """How much each cell changes in each slice `[T, H, W]`, and when the slices are."""

    motion: torch.Tensor
    slice_times: SliceTimes


class OutsideVlm:
    """One layer of two heads: the first looks at motion, the second everywhere."""

    num_layers, num_heads = 1, 2

    def __init__(self, source: str, revision: str, dtype: str, device_map: str | None) -> None:
        self.frames_per_slice = json.loads((Path(source) / "config.json").read_text())["frames_per_slice"]
        self.dtype = getattr(torch, dtype)

    def watch(self, videos: Sequence[np.ndarray], fps: Sequence[float]) -> list[Watched]:
        return [self._watch(frames, rate) for frames, rate in zip(videos, fps, strict=True)]

    def _watch(self, frames: np.ndarray, fps: float) -> Watched:
        if frames.shape[1] % CELL or frames.shape[2] % CELL:
            raise ProPhyError(f"frames of {frames.shape[1]}x{frames.shape[2]} are not in cells of {CELL}")
        grey = torch.tensor(frames, dtype=torch.float32).mean(-1)
        change = (grey - grey[:1]).abs()
        starts = [0, *range(1, len(frames), self.frames_per_slice)]
        ends = [*starts[1:], len(frames)]
        slices = [change[start:end].mean(0) for start, end in zip(starts, ends, strict=True)]
        return Watched(
            F.avg_pool2d(torch.stack(slices)[None], CELL)[0].to(self.dtype).float(),
            tuple((start / fps, (end - 1) / fps) for start, end in zip(starts, ends, strict=True)),
        )

    def answer(
        self,
        videos: Sequence[Watched],
        questions: Sequence[Sequence[str]],
        max_new_tokens: int,
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> list[list[Answer]]:
        heads = heads or range(self.num_heads)
        return [
            [self._answer(video, question, max_new_tokens, heads) for question in asked]
            for video, asked in zip(videos, questions, strict=True)
        ]

    def _answer(self, video: Watched, question: str, max_new_tokens: int, heads: Collection[int]) -> Answer:
        text = SAID.get(question, question)
        tokens = tuple(range(len(text.split())))[:max_new_tokens]
        looks = [video.motion, torch.ones_like(video.motion)]
        look = torch.stack([looks[head] for head in heads]).mean(0)
        return Answer(text, tokens, look if tokens else torch.zeros_like(look))
