"""Many questions about many videos as one batch: a row per video, and in it all that is asked about it.

Each token of a row belongs to one question. The mask lets it see the video and its own question's earlier
tokens. So the keys and values of a video are in memory once, whatever is asked about it, and videos,
questions and answers of a batch may be of any length.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from prophy.priors.attention import VideoAttention
from prophy.priors.vlm import SliceTimes

_VIDEO, _NOBODY = -1, -2  # whose a token is, where it is no question's


@dataclass(frozen=True)
class VideoPrefix:
    """What all questions about one video share, already computed.

    Attributes:
        layers: keys and values of every layer, `[1, heads, length, D]`.
        video: `[V]`, where the video's tokens are among the `length`; other tokens may stand between them.
        grid: the video's tokens as `(T, H, W)`, t slowest.
        next_position: rotary position of the first token after the video.
        slice_times: see `WatchedVideo`.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    video: torch.Tensor
    grid: tuple[int, int, int]
    next_position: int
    slice_times: SliceTimes

    @property
    def length(self) -> int:
        """Number of tokens of the prefix."""
        return self.layers[0][0].shape[-2]


class Conversation:
    """A batch of videos, what is asked about them, and what is said.

    Args:
        model: a Qwen2.5-VL or Qwen3-VL with `ATTENTION`.
        videos: one per row.
        questions: row and token ids of each question.
    """

    def __init__(
        self, model: Any, videos: Sequence[VideoPrefix], questions: Sequence[tuple[int, Sequence[int]]]
    ) -> None:
        self._model = model
        self._videos = videos
        self._rows = [row for row, _ in questions]
        self._next_position = [videos[row].next_position for row in self._rows]
        length = max(video.length for video in videos)
        self._left = [length - video.length for video in videos]  # padding before each video
        self._cache = DynamicCache(
            tuple(torch.cat([*map(_padded, part, self._left)]) for part in zip(*layer, strict=True))
            for layer in zip(*(video.layers for video in videos), strict=True)
        )
        is_padding = torch.arange(length) < torch.tensor(self._left)[:, None]
        self._owner = torch.where(is_padding, _NOBODY, _VIDEO).to(model.device)
        self._position = torch.zeros_like(self._owner)
        self._asked = self._append({number: ids for number, (_, ids) in enumerate(questions)})

    def say(self, max_new_tokens: int, end_tokens: Collection[int]) -> list[list[int]]:
        """The token ids of the answers: each the likeliest, until one of `end_tokens`, which is left out."""
        said: list[list[int]] = [[] for _ in self._rows]
        with self._kept():
            live, states = [*range(len(said))], self._asked
            while live:
                likeliest = self._model.lm_head(states).argmax(-1).tolist()
                tokens = {number: [token] for number, token in zip(live, likeliest, strict=True)}
                tokens = {number: ids for number, ids in tokens.items() if ids[0] not in end_tokens}
                for number, ids in tokens.items():
                    said[number] += ids
                live = [number for number in tokens if len(said[number]) < max_new_tokens]
                if live:
                    states = self._append({number: tokens[number] for number in live})
        return said

    def look(
        self, said: Sequence[Sequence[int]], layers: Collection[int], heads: Collection[int] | None
    ) -> list[torch.Tensor]:
        """Where the answers look in their videos, `[V]` float32 on the CPU each: mean over their tokens."""
        tokens = {number: ids for number, ids in enumerate(said) if ids}
        looks = [torch.zeros(len(self._videos[row].video)) for row in self._rows]
        if tokens:
            places = [video.video + left for video, left in zip(self._videos, self._left, strict=True)]
            attention = VideoAttention(layers, heads, places)
            with self._kept():
                self._append(tokens, attention)
            left = [attention.looks[row].cpu() for row in range(len(places))]
            for number, ids in tokens.items():
                row = self._rows[number]
                looks[number], left[row] = left[row][: len(ids)].mean(0), left[row][len(ids) :]
        return looks

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Takes back, at the end, what was appended meanwhile."""
        length, next_position = self._owner.shape[1], [*self._next_position]
        yield
        if self._owner.shape[1] > length:
            self._cache.crop(length - self._owner.shape[1])
        self._owner, self._position = self._owner[:, :length], self._position[:, :length]
        self._next_position = next_position

    def _append(
        self, tokens: Mapping[int, Sequence[int]], video_attention: VideoAttention | None = None
    ) -> torch.Tensor:
        """Appends tokens to questions, by number; returns the hidden state of the last of each, `[Q, D]`."""
        rows: list[list[tuple[int, int, int]]] = [[] for _ in self._videos]
        last = []
        for number, ids in tokens.items():
            row = self._rows[number]
            first = self._next_position[number]
            rows[row] += [(token, number, first + place) for place, token in enumerate(ids)]
            last.append((row, len(rows[row]) - 1))
            self._next_position[number] += len(ids)
        size = max(map(len, rows))
        filled = [[*row, *[(0, _NOBODY, 0)] * (size - len(row))] for row in rows]
        input_ids, owner, position = torch.tensor(filled, device=self._owner.device).unbind(-1)
        self._owner = torch.cat([self._owner, owner], 1)
        self._position = torch.cat([self._position, position], 1)
        own = self._owner[:, None] == owner[..., None]
        earlier = self._position[:, None] <= position[..., None]
        states = self._model.model(
            input_ids=input_ids,
            attention_mask=((self._owner == _VIDEO)[:, None] | own & earlier)[:, None],
            position_ids=position.expand(3, -1, -1),
            past_key_values=self._cache,
            use_cache=True,
            video_attention=video_attention,
        ).last_hidden_state
        return states[tuple(torch.tensor(last).T)]


def _padded(part: torch.Tensor, left: int) -> torch.Tensor:
    return F.pad(part, (0, 0, left, 0))
