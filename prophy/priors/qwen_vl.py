"""Qwen2.5-VL and Qwen3-VL: shown a video once, asked many questions about it.

One prefill holds everything that the questions about a video share (system turn and video). All questions
about all videos of a batch are then answered together; and one pass over the finished answers, with an
attention function of our own, keeps where each token of them looks, in the chosen layers only. All else is
plain SDPA. Does not know what is asked.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from prophy.device import default_device
from prophy.errors import ProPhyError
from prophy.priors.attention import ATTENTION
from prophy.priors.conversation import Conversation, VideoPrefix
from prophy.priors.vlm import Answer, SliceTimes

_VIDEO_TOKEN_TYPE = 2  # what get_rope_index calls a video in mm_token_type_ids


@dataclass(frozen=True)
class _VideoPrompt:
    """What the model reads of a video: what `pixels`, `video_tokens` and `slice_times` give."""

    patches: torch.Tensor
    grid: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    next_position: int
    slice_times: SliceTimes

    @property
    def size(self) -> tuple[int, int, int, int]:
        """The grid, and the number of tokens: prompts of one size are a batch without padding."""
        t, h, w = self.grid[0].tolist()
        return t, h, w, self.ids.shape[1]


class _QwenVL:
    """A Qwen-VL with its tokenizer and pixel statistics; the arguments are those of `VideoLanguageModel`.

    Raises:
        OSError: there is no such model.
        ValueError: its tokenizer has no chat template.
    """

    _model_class: ClassVar[Any]

    def __init__(self, source: str, revision: str, dtype: str, device_map: str | None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision)
        if self.tokenizer.chat_template is None:
            raise ValueError("its tokenizer has no chat template; add the file chat_template.jinja")
        processor = AutoImageProcessor.from_pretrained(source, revision=revision)
        model = self._model_class.from_pretrained(
            source,
            revision=revision,
            dtype=getattr(torch, dtype),
            device_map=device_map or default_device(),
        )
        self.model = model.eval()
        self.model.set_attn_implementation(ATTENTION)
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)
        end = model.generation_config.eos_token_id
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])

    @property
    def num_layers(self) -> int:
        """Number of language layers, whose attention can be kept."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Number of attention heads of each of them."""
        return self.model.config.text_config.num_attention_heads

    def pixels(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames as the model reads them: normalised patches in the order of the stock processor, on the CPU.

        Args:
            frames: `[T, H, W, 3]` uint8 RGB.

        Returns:
            Patches `[t h w, 3 temporal_patch patch patch]` float32, and the grid `[[t, h, w]]` in patches.

        Raises:
            ProPhyError: T, H or W does not divide into patches.
        """
        vision = self.model.config.vision_config
        patch, merge, temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        num_frames, height, width, _ = frames.shape
        if num_frames % temporal or height % (patch * merge) or width % (patch * merge):
            raise ProPhyError(
                f"the VLM cannot read {num_frames} frames of {height}x{width} pixels; set vlm.num_frames to "
                f"a multiple of {temporal}, vlm.height and vlm.width to multiples of {patch * merge}"
            )
        t, h, w = num_frames // temporal, height // patch, width // patch
        video = torch.tensor(frames).permute(0, 3, 1, 2) / 255
        video = (video - self.mean) / self.std
        video = video.reshape(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        patches = video.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return patches, torch.tensor([[t, h, w]])

    def split_prompt(self, question: str) -> tuple[str, str]:
        """The chat prompt of a video and a question, split at the placeholder of the video's tokens."""
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
        prompt = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        head, tail = prompt.split(self.tokenizer.convert_ids_to_tokens(self.model.config.video_token_id))
        return head, tail

    def slice_times(self, num_frames: int, fps: float) -> SliceTimes:
        """Times of the first and the last frame of each temporal patch."""
        size = self.model.config.vision_config.temporal_patch_size
        return tuple((first / fps, (first + size - 1) / fps) for first in range(0, num_frames, size))

    def video_tokens(self, grid: torch.Tensor, fps: float) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Everything that precedes a question: the chat's head and the placeholders of the video.

        Args:
            grid: `[[t, h, w]]`, of the patches.
            fps: frame rate of the frames.

        Returns:
            Token ids `[1, L]`, rotary positions `[3, 1, L]`, and the position of the first token after them.
        """
        head = self.tokenizer(self.split_prompt("")[0], add_special_tokens=False).input_ids
        # One token after the video shows where the positions go on.
        config = self.model.config
        ids = torch.tensor([[*head, *self._placeholders(grid, fps), config.vision_end_token_id]])
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == config.video_token_id) * _VIDEO_TOKEN_TYPE,
            video_grid_thw=grid,
            # Of Qwen2.5-VL alone: others ignore it.
            second_per_grid_ts=torch.tensor([config.vision_config.temporal_patch_size / fps]),
        )
        return ids[:, :-1], positions[..., :-1], int(positions[0, 0, -1])

    def _placeholders(self, grid: torch.Tensor, fps: float) -> list[int]:
        """Tokens that stand for the video in the prompt: one of `video_token_id` for each of its own."""
        raise NotImplementedError

    @torch.inference_mode()
    def watch(self, videos: Sequence[np.ndarray], fps: Sequence[float]) -> list[VideoPrefix]:
        """Runs the vision tower and the prefill of everything that precedes a question; see the protocol."""
        prompts = [self._prompt(frames, rate) for frames, rate in zip(videos, fps, strict=True)]
        groups = defaultdict(list)
        for number, prompt in enumerate(prompts):
            groups[prompt.size].append(number)
        prefixes: dict[int, VideoPrefix] = {}
        for numbers in groups.values():
            prefixes |= zip(numbers, self._prefill([prompts[number] for number in numbers]), strict=True)
        return [prefixes[number] for number in range(len(videos))]

    def _prompt(self, frames: np.ndarray, fps: float) -> _VideoPrompt:
        patches, grid = self.pixels(frames)
        return _VideoPrompt(patches, grid, *self.video_tokens(grid, fps), self.slice_times(len(frames), fps))

    def _prefill(self, prompts: Sequence[_VideoPrompt]) -> list[VideoPrefix]:
        """Runs the model on prompts of one size."""
        device = self.model.device
        ids = torch.cat([prompt.ids for prompt in prompts]).to(device)
        cache = self.model.model(
            input_ids=ids,
            position_ids=torch.cat([prompt.positions for prompt in prompts], 1).to(device),
            pixel_values_videos=torch.cat([prompt.patches for prompt in prompts]).to(device),
            video_grid_thw=torch.cat([prompt.grid for prompt in prompts]).to(device),
            use_cache=True,
        ).past_key_values
        merge = self.model.config.vision_config.spatial_merge_size
        return [
            VideoPrefix(
                [(keys[row : row + 1], values[row : row + 1]) for keys, values, _ in cache],
                (ids[row] == self.model.config.video_token_id).nonzero()[:, 0],
                (prompt.size[0], prompt.size[1] // merge, prompt.size[2] // merge),
                prompt.next_position,
                prompt.slice_times,
            )
            for row, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def answer(
        self,
        videos: Sequence[VideoPrefix],
        questions: Sequence[Sequence[str]],
        max_new_tokens: int,
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> list[list[Answer]]:
        """Answers all questions, then reads the answers in a pass that keeps attention; see the protocol."""
        tails = [
            (row, self.tokenizer(self.split_prompt(question)[1], add_special_tokens=False).input_ids)
            for row, asked in enumerate(questions)
            for question in asked
        ]
        conversation = Conversation(self.model, videos, tails)
        said = conversation.say(max_new_tokens, self.end_tokens)
        answers: list[list[Answer]] = [[] for _ in videos]
        for (row, _), ids, look in zip(tails, said, conversation.look(said, layers, heads), strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[row].append(Answer(text, tuple(ids), look.reshape(videos[row].grid)))
        return answers


class Qwen25VL(_QwenVL):
    """Qwen2.5-VL: the video is one run of tokens, and their rotary positions tell the time."""

    _model_class = Qwen2_5_VLForConditionalGeneration

    def _placeholders(self, grid: torch.Tensor, fps: float) -> list[int]:
        num_tokens = int(grid.prod()) // self.model.config.vision_config.spatial_merge_size**2
        return num_tokens * [self.model.config.video_token_id]


class Qwen3VL(_QwenVL):
    """Qwen3-VL: words before each slice of the video say its time, as `Qwen3VLProcessor` writes them."""

    _model_class = Qwen3VLForConditionalGeneration

    def _placeholders(self, grid: torch.Tensor, fps: float) -> list[int]:
        config = self.model.config
        t, h, w = grid[0].tolist()
        slice_tokens = h * w // config.vision_config.spatial_merge_size**2 * [config.video_token_id]
        ids: list[int] = []
        for start_s, end_s in self.slice_times(t * config.vision_config.temporal_patch_size, fps):
            words = f"<{(start_s + end_s) / 2:.1f} seconds>"
            ids += self.tokenizer(words, add_special_tokens=False).input_ids
            ids += [config.vision_start_token_id, *slice_tokens, config.vision_end_token_id]
        return ids
