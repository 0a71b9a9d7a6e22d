"""The embedded VLM: a Qwen2.5-VL of 2.5 million parameters with a word-level tokenizer.

It has the files that a large one has, so that the same code reads both. Its vocabulary is what the questions
about a taxonomy ask and what the sandbox's captions can say; after a change of either it must be trained
anew.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from prophy.priors.questionnaire import NONE, questionnaire
from prophy.sandbox import vocabulary
from prophy.taxonomy import Taxonomy

SEED = 0
BACKGROUND_ANSWER = "a dark background"
ABSENT_ANSWER = "there is no"
PATCH_SIZE = 4
TEMPORAL_PATCH_SIZE = 2
MERGE_SIZE = 2

_PAD, _START, _END, _UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"
_VISION_START, _VISION_END, _VIDEO, _IMAGE = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
)
_ROLES = ("user", "assistant")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def build_tokenizer(taxonomy: Taxonomy) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of the questionnaire and the sandbox's captions."""
    special = [_PAD, _START, _END, _VISION_START, _VISION_END, _VIDEO, _IMAGE, _UNKNOWN]
    vocabulary_ids = {word: index for index, word in enumerate([*special, *_words(taxonomy)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary_ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # puts a comma back onto the word before it
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_START, _VISION_START, _VISION_END, _VIDEO, _IMAGE],
        chat_template=_CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Width 192, 4 language layers, 2 vision layers.

    `rope_theta` is small because a video's width axis gets the lowest rotary frequencies: at the usual 1e6
    eight neighbouring cells would share one angle.
    """
    ids = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if token in tokenizer.all_special_tokens
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids[_PAD],
            "eos_token_id": ids[_END],
            "pad_token_id": ids[_PAD],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 4,
        },
        vision_start_token_id=ids[_VISION_START],
        vision_end_token_id=ids[_VISION_END],
        video_token_id=ids[_VIDEO],
        image_token_id=ids[_IMAGE],
        tie_word_embeddings=True,
    )


def _words(taxonomy: Taxonomy) -> list[str]:
    """Every token that a question or an answer can hold, each once, in a fixed order."""
    texts = [
        *(*_ROLES, NONE, BACKGROUND_ANSWER, ABSENT_ANSWER, *taxonomy.names),
        *(question.text for question in questionnaire(taxonomy)),
        *vocabulary(),
    ]
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    return list(dict.fromkeys(word for text in texts for word, _ in split(text)))


def write_vlm(folder: Path, taxonomy: Taxonomy) -> None:
    """Writes the VLM with fresh weights."""
    tokenizer = build_tokenizer(taxonomy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE, temporal_patch_size=TEMPORAL_PATCH_SIZE, merge_size=MERGE_SIZE
    ).save_pretrained(folder)
