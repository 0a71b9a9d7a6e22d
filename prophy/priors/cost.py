"""What a VLM takes for the priors of a clip, before a weight is fetched. Reads configurations alone.

Parameters are counted on the meta device.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from prophy.priors.questionnaire import BACKGROUND, CAPTION, ask_presence, describe
from prophy.priors.vlm import load_config
from prophy.taxonomy import Taxonomy

NUM_PHENOMENA = 2  # of a clip, assumed
_CHAT_TOKENS = 16  # of the chat's frame around a video, or around a question

_CLASSES: Mapping[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-VL-32B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3456,
            "num_heads": 16,
            "out_hidden_size": 5120,
            "tokens_per_second": 2,
        },
    }
}
"""Configurations of the presets' models, so that a plan of them takes no network."""


@dataclass(frozen=True)
class VlmCost:
    """What the priors of a clip without labels take.

    Attributes:
        num_parameters: how many the model has.
        weights: bytes of them.
        num_tokens: tokens that the language layers get of a clip.
        flops: operations of a clip, but for saying answers: watching, reading the questions, and the pass
            over finished answers that keeps where they look.
        num_steps: steps of saying answers, each of which gives every answer of a batch a token.
        step_bytes: bytes that such a step reads, of weights; it takes longer to read them than to compute.
        clip_bytes: bytes that such a step reads for each clip of a batch: its keys and values.
    """

    num_parameters: int
    weights: int
    num_tokens: int
    flops: int
    num_steps: int
    step_bytes: int
    clip_bytes: int

    def seconds(self, batch_size: int, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds of a clip, of a batch of `batch_size`, on a device that does and reads so much a second."""
        read = self.num_steps * (self.step_bytes / batch_size + self.clip_bytes)
        return self.flops / flops_per_s + read / bytes_per_s


def published_or_loaded(pretrained: str, revision: str | None) -> Mapping[str, Any]:
    """The `config.json` of a model, for `vlm_cost`.

    Args:
        pretrained: see `load_vlm`.
        revision: a hub id's.

    Raises:
        ProPhyError: there is no such model.
    """
    return PUBLISHED.get(pretrained) or load_config(pretrained, revision)


def vlm_cost(
    settings: Mapping[str, Any],
    dtype: str,
    taxonomy: Taxonomy,
    shape: tuple[int, int, int],
    num_layers_kept: int | None,
    max_new_tokens: int,
) -> VlmCost | None:
    """Counts it for answers that have all `max_new_tokens`: of a batch, the longest says how many steps.

    A question has a token for each of its words and marks, about as many as a tokenizer makes of it.

    Args:
        settings: the model's `config.json`.
        dtype: "float32" or "bfloat16".
        taxonomy: what the VLM is asked for; a clip shows `NUM_PHENOMENA` of them.
        shape: frames, height and width of what it sees.
        num_layers_kept: layers whose attention is kept; None is all.
        max_new_tokens: longest answer.

    Returns:
        None for a model of another package, of which nothing is known.
    """
    values = dict(settings)
    model_type = values.pop("model_type")
    if model_type not in _CLASSES:
        return None
    config = AutoConfig.for_model(model_type, **values)
    text, vision = config.text_config, config.vision_config
    with torch.device("meta"):
        model = _CLASSES[model_type](config)
    item, language, tower = getattr(torch, dtype).itemsize, model.model.language_model, model.model.visual

    # 1. The video: patches in the vision tower, of which the language layers get merged ones
    sizes = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    grid = [length // size for length, size in zip(shape, sizes, strict=True)]
    patches, slice_patches = prod(grid), grid[1] * grid[2]
    num_tokens = patches // vision.spatial_merge_size**2
    mergers = sum(_matrices(part) for name, part in tower.named_children() if "merger" in name)
    flops = 2 * (patches * (_matrices(tower) - mergers) + num_tokens * mergers)
    whole = getattr(vision, "fullatt_block_indexes", range(vision.depth))
    window = (vision.window_size // vision.patch_size) ** 2 if len(whole) < vision.depth else 0
    seen = len(whole) * slice_patches + (vision.depth - len(whole)) * min(window, slice_patches)
    flops += 4 * patches * seen * vision.hidden_size

    # 2. The language layers: the video, then two rounds of questions and answers
    layers, head_dim = text.num_hidden_layers, getattr(text, "head_dim", None)
    head_dim = head_dim or text.hidden_size // text.num_attention_heads
    width, per_token = text.num_attention_heads * head_dim, 2 * _matrices(language)
    prefix = num_tokens + _CHAT_TOKENS
    flops += prefix * per_token + 4 * prefix**2 * width * layers
    rounds = [
        [CAPTION, ask_presence(taxonomy), BACKGROUND],
        [describe(entry) for entry in taxonomy.phenomena[:NUM_PHENOMENA]],
    ]
    kept = layers if num_layers_kept is None else num_layers_kept
    for questions in rounds:
        asked = sum(_num_words(question.text) + _CHAT_TOKENS for question in questions)
        said = len(questions) * max_new_tokens
        flops += (asked + said) * per_token + 4 * asked * (prefix + asked) * width * layers
        # Where attention is kept, its scores are computed twice.
        flops += said * (prefix + asked + said) * width * (4 * layers + 2 * kept)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return VlmCost(
        num_parameters=num_parameters,
        weights=num_parameters * item,
        num_tokens=num_tokens,
        flops=flops,
        num_steps=len(rounds) * max_new_tokens,
        step_bytes=(_matrices(language) + model.lm_head.weight.numel()) * item,
        clip_bytes=2 * layers * text.num_key_value_heads * head_dim * prefix * item,
    )


def _matrices(module: nn.Module) -> int:
    """Parameters that each token is multiplied with."""
    tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.dim() > 1 and not any(parameter is table for table in tables)
    )


def _num_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))
