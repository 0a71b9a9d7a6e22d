"""A Qwen2.5-VL that is shown a video once and asked many questions about it.

One prefill holds everything that the questions share (system turn and video); all questions then run as one
batch from copies of that prefix. While an answer is generated, an attention function of our own adds up where
each answer token looks, in the chosen layers only; all else is plain SDPA. Does not know what is asked.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prophy.device import default_device
from prophy.errors import ProPhyError
from prophy.tiny import bundled

_ATTENTION = "sdpa_with_video_attention"
_VIDEO_TOKEN_TYPE = 2  # what get_rope_index calls a video in mm_token_type_ids


class VideoAttention:
    """Where the one query token of each row looks in the video: the mean over chosen heads and layers.

    Attributes:
        mean: `[B, V]` float32, the attention of each row to the `V` video tokens.
    """

    def __init__(
        self,
        layers: Collection[int],
        heads: Collection[int] | None,
        video: slice,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.video = video
        self.mean = torch.zeros(batch_size, video.stop - video.start, device=device)

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        """Adds a layer: query `[B, heads, 1, D]`, key `[B, kv_heads, L, D]`, boolean mask `[B, 1, 1, L]`."""
        grouped = query.reshape(*key.shape[:2], -1, key.shape[-1])  # [B, kv_heads, heads / kv_heads, D]
        scores = (grouped @ key.transpose(-1, -2)).float() * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        rows = scores.softmax(-1)[..., self.video]
        mean = rows.mean((1, 2)) if self.heads is None else rows.flatten(1, 2)[:, list(self.heads)].mean(1)
        self.mean += mean.to(self.mean.device) / len(self.layers)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    video_attention: VideoAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; and, where a forward was given a `video_attention`, the rows that it asks for."""
    if video_attention is not None and module.layer_idx in video_attention.layers:
        video_attention.add(query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class VideoPrefix:
    """What all questions about one video share, already computed.

    Attributes:
        cache: keys and values of every layer, batch 1, `length` tokens.
        length: number of tokens of the prefix.
        video: where the video's tokens are in it.
        grid: the video's tokens as `(T, H, W)`, t slowest.
        next_position: rotary position of the first token after the video.
    """

    cache: DynamicCache
    length: int
    video: slice
    grid: tuple[int, int, int]
    next_position: int

    def branch(self, batch_size: int) -> DynamicCache:
        """A copy of the cache for `batch_size` rows, free to grow."""
        return DynamicCache(
            [
                (keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1))
                for keys, values, _ in self.cache
            ]
        )


@dataclass(frozen=True)
class Answer:
    """What the VLM said, and where it looked while it said it.

    Attributes:
        text: the answer without special tokens.
        token_ids: the generated tokens, without the one that ends the answer.
        attention: `[T, H, W]` float32 on the CPU: attention of the answer's tokens to the video's, mean over
            tokens, chosen heads and layers; not normalised over the video. All zero for an empty answer.
    """

    text: str
    token_ids: tuple[int, ...]
    attention: torch.Tensor


class VideoLanguageModel:
    """A `Qwen2_5_VLForConditionalGeneration` with its tokenizer and pixel statistics.

    Args:
        pretrained: hub id or folder; "tiny" is the embedded one.
        revision: of a hub id; None is its main branch.
        dtype: "float32" or "bfloat16".
        device_map: as in transformers ("auto" spreads over the visible GPUs); None is this process's device.

    Raises:
        ProPhyError: there is no such model, it is not a Qwen2.5-VL, or its tokenizer has no chat template.
    """

    def __init__(self, pretrained: str, revision: str | None, dtype: str, device_map: str | None) -> None:
        revision = revision or "main"
        source = str(bundled("vlm")) if pretrained == "tiny" else pretrained
        try:
            model_type = AutoConfig.from_pretrained(source, revision=revision).model_type
            if model_type != "qwen2_5_vl":
                raise ValueError(f"it is a {model_type} model; give a Qwen2.5-VL")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision)
            if self.tokenizer.chat_template is None:
                raise ValueError("its tokenizer has no chat template; add the file chat_template.jinja")
            processor = AutoImageProcessor.from_pretrained(source, revision=revision)
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, dtype),
                device_map=device_map or default_device(),
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ProPhyError(f"cannot load vlm.pretrained {pretrained!r}: {reason}") from None
        self.model = model.eval()
        self.model.set_attn_implementation(_ATTENTION)
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)
        end = model.generation_config.eos_token_id
        self.end_tokens = torch.tensor(end if isinstance(end, list) else [end], device=model.device)

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

    def video_tokens(self, grid: torch.Tensor, fps: float) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Everything that precedes a question: the chat's head and the placeholders of the video.

        Args:
            grid: `[[t, h, w]]`, of the patches.
            fps: frame rate of the frames.

        Returns:
            Token ids `[1, L]`, rotary positions `[3, 1, L]`, and the position of the first token after them.
        """
        config = self.model.config
        num_tokens = int(grid.prod()) // config.vision_config.spatial_merge_size**2
        head = self.tokenizer(self.split_prompt("")[0], add_special_tokens=False).input_ids
        # One token after the video shows where the positions go on.
        ids = torch.tensor([[*head, *num_tokens * [config.video_token_id], config.vision_end_token_id]])
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == config.video_token_id) * _VIDEO_TOKEN_TYPE,
            video_grid_thw=grid,
            second_per_grid_ts=torch.tensor([config.vision_config.temporal_patch_size / fps]),
        )
        return ids[:, :-1], positions[..., :-1], int(positions[0, 0, -1])

    @torch.inference_mode()
    def watch(self, frames: np.ndarray, fps: float) -> VideoPrefix:
        """Runs the vision tower and the prefill of everything that precedes a question.

        Args:
            frames: `[T, H, W, 3]` uint8 RGB.
            fps: frame rate of these frames.
        """
        patches, grid = self.pixels(frames)
        ids, positions, next_position = self.video_tokens(grid, fps)
        device = self.model.device
        cache = self.model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            pixel_values_videos=patches.to(device),
            video_grid_thw=grid.to(device),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        merge = self.model.config.vision_config.spatial_merge_size
        t, h, w = grid[0].tolist()
        length = ids.shape[1]
        video = slice(length - t * h * w // merge**2, length)
        return VideoPrefix(cache, length, video, (t, h // merge, w // merge), next_position)

    @torch.inference_mode()
    def answer(
        self,
        prefix: VideoPrefix,
        questions: Sequence[str],
        max_new_tokens: int,
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> list[Answer]:
        """Answers all questions as one batch, greedily, and keeps where each answer looks.

        Args:
            prefix: of the video; it is left as it was.
            questions: at least one.
            max_new_tokens: an answer is cut there.
            layers: language layers whose attention is averaged.
            heads: heads of these layers that are averaged; None is all.
        """
        batch_size, device = len(questions), self.model.device
        tails = [self.split_prompt(question)[1] for question in questions]
        tokenized = self.tokenizer(
            tails, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(device)
        tokens, mask = tokenized.input_ids, tokenized.attention_mask
        positions = prefix.next_position - 1 + mask.cumsum(1)
        mask = torch.cat([mask.new_ones(batch_size, prefix.length), mask], 1)
        cache = prefix.branch(batch_size)

        def forward(video_attention: VideoAttention | None) -> torch.Tensor:
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions.expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                video_attention=video_attention,
            ).logits[:, -1]

        logits = forward(None)
        attention = torch.zeros(batch_size, prefix.video.stop - prefix.video.start, device=device)
        live = torch.ones(batch_size, dtype=torch.bool, device=device)
        token_ids: list[list[int]] = [[] for _ in questions]
        for _ in range(max_new_tokens):
            tokens = logits.argmax(-1, keepdim=True).to(device)
            live &= ~torch.isin(tokens[:, 0], self.end_tokens)
            if not live.any():
                break
            for row in live.nonzero()[:, 0].tolist():
                token_ids[row].append(int(tokens[row]))
            mask = torch.cat([mask, mask.new_ones(batch_size, 1)], 1)
            positions = positions[:, -1:] + 1
            video_attention = VideoAttention(layers, heads, prefix.video, batch_size, device)
            logits = forward(video_attention)
            attention += video_attention.mean * live[:, None]
        return [
            Answer(
                self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                tuple(ids),
                (row / max(len(ids), 1)).reshape(prefix.grid).cpu(),
            )
            for ids, row in zip(token_ids, attention, strict=True)
        ]
