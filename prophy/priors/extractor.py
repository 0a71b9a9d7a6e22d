"""Clips in, their priors out: caption, answers, phenomena and raw attention maps.

Does not know where clips come from, how priors are stored, or what targets are made of the maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prophy.errors import ProPhyError
from prophy.priors.questionnaire import (
    BACKGROUND,
    CAPTION,
    Question,
    ask_presence,
    describe_named,
    parse_presence,
)
from prophy.priors.vlm import Answer, SliceTimes, load_vlm
from prophy.taxonomy import Taxonomy, index_of


@dataclass(frozen=True)
class Clip:
    """What the VLM is shown.

    Attributes:
        frames: `[T, H, W, 3]` uint8 RGB, T, H and W as the VLM can divide them into patches.
        fps: frame rate of these frames.
        phenomena: the clip's labels, by name; None lets the VLM name them.
    """

    frames: np.ndarray
    fps: float
    phenomena: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Priors:
    """What the VLM knows about one clip.

    Attributes:
        vlm_caption: the VLM's own caption.
        answers: question id -> answer, as said.
        phenomena: names, as given, else as the VLM says; in the taxonomy's order.
        unparsed: pieces of the presence answer that are no phenomenon's name; they were not used.
        map_phenomena: taxonomy indices of the K phenomena that have a map, in the maps' order.
        maps: `[K + 1, T, H, W]` float32 on the VLM's grid: attention of each answer to the video, raw; the
            background's is the last.
        slice_times: which times the T slices of the maps cover.
    """

    vlm_caption: str
    answers: dict[str, str]
    phenomena: tuple[str, ...]
    unparsed: tuple[str, ...]
    map_phenomena: list[int]
    maps: np.ndarray
    slice_times: SliceTimes


class PriorExtractor:
    """Asks a VLM the questionnaire about clips, from one prefill of each video.

    Args:
        pretrained: hub id or folder, also in S3; "tiny" is the embedded one.
        taxonomy: the phenomena that are asked for.
        revision: a hub id's.
        dtype: "float32" or "bfloat16".
        device_map: as in transformers; None is this process's device.
        layers: language layers whose attention is kept; None is all.
        max_new_tokens: longest answer.
        heads: heads of these layers whose attention is kept; None is all.

    Raises:
        ProPhyError: the model cannot be loaded, or has no such layer or head.
    """

    def __init__(
        self,
        pretrained: str,
        taxonomy: Taxonomy,
        revision: str | None = None,
        dtype: str = "bfloat16",
        device_map: str | None = None,
        layers: list[int] | None = None,
        max_new_tokens: int = 64,
        heads: list[int] | None = None,
    ) -> None:
        self.taxonomy = taxonomy
        self.vlm = load_vlm(pretrained, revision, dtype, device_map)
        self.layers = frozenset(range(self.vlm.num_layers) if layers is None else layers)
        if not self.layers or max(self.layers) >= self.vlm.num_layers:
            raise ProPhyError(
                f"vlm.layers ({layers}) must name language layers of {pretrained}, "
                f"which has 0 to {self.vlm.num_layers - 1}"
            )
        if heads is not None and (not heads or max(heads) >= self.vlm.num_heads):
            raise ProPhyError(
                f"vlm.heads ({heads}) must name attention heads of {pretrained}, "
                f"which has 0 to {self.vlm.num_heads - 1}"
            )
        self.heads = heads
        self.max_new_tokens = max_new_tokens

    def __call__(self, clips: Sequence[Clip]) -> list[Priors]:
        """Extracts the priors of at least one clip; the VLM is given all of them as one batch."""
        videos = self.vlm.watch([clip.frames for clip in clips], [clip.fps for clip in clips])
        presence = ask_presence(self.taxonomy)
        questions = [
            [CAPTION, presence, BACKGROUND]
            if clip.phenomena is None
            else [CAPTION, BACKGROUND, *describe_named(self.taxonomy, clip.phenomena)]
            for clip in clips
        ]
        answers = self._ask(videos, questions)
        named = [
            parse_presence(said[presence.id].text, self.taxonomy.names)
            if clip.phenomena is None
            else (clip.phenomena, ())
            for clip, said in zip(clips, answers, strict=True)
        ]
        questions = [
            describe_named(self.taxonomy, phenomena) if clip.phenomena is None else []
            for clip, (phenomena, _) in zip(clips, named, strict=True)
        ]
        answers = [said | more for said, more in zip(answers, self._ask(videos, questions), strict=True)]
        return [
            Priors(
                vlm_caption=said[CAPTION.id].text,
                answers={key: answer.text for key, answer in said.items()},
                phenomena=phenomena,
                unparsed=unparsed,
                map_phenomena=[index_of(phenomenon, self.taxonomy.names) for phenomenon in phenomena],
                maps=torch.stack([said[key].attention for key in [*phenomena, BACKGROUND.id]]).numpy(),
                slice_times=video.slice_times,
            )
            for video, said, (phenomena, unparsed) in zip(videos, answers, named, strict=True)
        ]

    def _ask(self, videos: Sequence[Any], questions: Sequence[list[Question]]) -> list[dict[str, Answer]]:
        """The answers about each video, by the question's id; there may be no question about a video."""
        rows = [row for row, asked in enumerate(questions) if asked]
        answers: list[dict[str, Answer]] = [{} for _ in videos]
        if rows:
            texts = [[question.text for question in questions[row]] for row in rows]
            said = self.vlm.answer(
                [videos[row] for row in rows], texts, self.max_new_tokens, self.layers, self.heads
            )
            for row, of_video in zip(rows, said, strict=True):
                ids = [question.id for question in questions[row]]
                answers[row] = dict(zip(ids, of_video, strict=True))
        return answers
