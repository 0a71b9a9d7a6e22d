"""Trains the embedded text encoder to say which thing, in which colour, is where.

Every token is taught the products scene x side, colour x side and scene x colour of the clause that it stands
in: taught a scene and a side each by itself, an average over tokens would lose which belongs to which, and
cross-attention is nearly an average. The sentences are the sandbox's captions and paraphrases of them.

Or it is taught to fill in words that are missing, as the encoders of published backbones were, which saw text
alone: what a branch can add to such a backbone is asked of it.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from prophy.device import autocast
from prophy.pretraining.paraphrases import COLOUR_SYNONYMS, SCENE_PARAPHRASES, SIDE_PHRASES
from prophy.pretraining.recipe import (
    Progress,
    fit,
    round_to_bfloat16,
    set_learning_rate,
    simulator,
    trapezoid,
)
from prophy.sandbox import COLOURS, HELD_OUT_PAIRS, SCENES, Part, Split, describe, draw_parts
from prophy.tiny.pipeline import MAX_SEQUENCE_LENGTH
from prophy.tiny.text import TEXT_DIM, write_text_encoder

logger = logging.getLogger(__name__)

_SCENES = [scene.name for scene in SCENES]
_COLOURS = list(COLOURS)
_SIDES = ["left", "right", "middle"]
_PRODUCTS = (
    (len(_SCENES), len(_SIDES)),
    (len(_COLOURS), len(_SIDES)),
    (len(_SCENES), len(_COLOURS)),
)
_IGNORED = -100  # label of tokens that are not asked for: they stand in no clause, or are not missing
_MISSING = 0.15  # share of the words, BERT's

Task = Literal["products", "missing_words"]
"""What the encoder is taught: what stands together in a clause, or which words are missing."""


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How the text encoder is trained.

    Attributes:
        num_steps: optimiser steps, each on sentences that are drawn anew.
        num_held_out: pairs of phenomena that were never trained together to measure on, and as many that were
            to fit the probe on.
        task: what is taught.
        seed: decides weights and draws.
        batch_size: sentences in a step.
        learning_rate: AdamW's.
        warmup_steps: steps until the learning rate is reached.
        decay_share: last share of the steps, in which it falls to zero.
        paraphrased: share of clauses that no caption holds; it and the next two rise from 0 in the first half
            of the steps, because what stands in which clause is learned from captions first.
        unknown: share of tokens whose embedding is replaced by noise, so that an unknown word does no harm.
        blur: size of the noise that is added to every embedding, so that a word's neighbours mean the same.
    """

    num_steps: int
    num_held_out: int = 2000
    task: Task = "products"
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    decay_share: float = 0.5
    paraphrased: float = 0.6
    unknown: float = 0.04
    blur: float = 0.2


class Said(NamedTuple):
    """A sentence, and its clauses: the first character, the one after the last, and the part they tell of."""

    text: str
    clauses: list[tuple[int, int, Part]]


def say(parts: tuple[Part, ...], rng: np.random.Generator, paraphrased: float) -> Said:
    """A sentence about parts, in either order: wordings of captions, or, in a share of clauses, others."""
    text, clauses = "", []
    for part in (parts[index] for index in rng.permutation(len(parts))):
        words = _paraphrase(part, rng) if rng.random() < paraphrased else str(rng.choice(describe((part,))))
        text = f"{text} and " if text else ""
        clauses.append((len(text), len(text) + len(words), part))
        text += words
    return Said(text, clauses)


def _paraphrase(part: Part, rng: np.random.Generator) -> str:
    sentences = SCENE_PARAPHRASES[part.scene.name] + part.scene.wordings
    synonyms = (part.colour, *COLOUR_SYNONYMS[part.colour])
    words = str(rng.choice(sentences)).format(colour=rng.choice(synonyms))
    if part.side not in SIDE_PHRASES:
        return words
    where = str(rng.choice((f"on the {part.side}", *SIDE_PHRASES[part.side])))
    match rng.integers(4):
        case 0:
            return f"{where}, {words}"
        case 1:
            return f"{where} {words}"
        case _:
            return f"{words} {where}"


class _Products(torch.nn.Module):
    """The encoder, and a linear map from a token to each product."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = torch.nn.ModuleList(torch.nn.Linear(TEXT_DIM, a * b) for a, b in _PRODUCTS)

    def forward(self, asked: "_Asked", embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(inputs_embeds=embeddings, attention_mask=asked.mask).last_hidden_state
        names = ("scene_side", "colour_side", "scene_colour")
        return {
            name: _cross_entropy(head(states), labels)
            for name, head, labels in zip(names, self.heads, asked.products, strict=True)
        }


class _MissingWords(torch.nn.Module):
    """The encoder, and a linear map from a token to the embedding of the word that is missing there."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(TEXT_DIM, TEXT_DIM)

    def forward(self, asked: "_Asked", embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        given = embeddings.masked_fill(asked.is_missing[..., None], 0.0)
        states = self.encoder(inputs_embeds=given, attention_mask=asked.mask).last_hidden_state
        logits = self.head(states) @ self.encoder.shared.weight.T
        return {"missing_word": _cross_entropy(logits, asked.ids.masked_fill(~asked.is_missing, _IGNORED))}


_LESSONS: dict[Task, type[_Products | _MissingWords]] = {
    "products": _Products,
    "missing_words": _MissingWords,
}


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens that are asked for; `[B, L, N]` and `[B, L]`."""
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


def pretrain_text(folder: Path, recipe: TextRecipe) -> Progress:
    """Trains, measures and saves; goes on where it was cut off.

    Writes `text_encoder/` (encoder and tokenizer in transformers' layout, bfloat16) and `text_encoder.json`
    (recipe and measurements) in `folder`; keeps `text_encoder.pt` there.
    """
    place = folder / "text_encoder"
    if not (folder / "text_encoder.pt").exists():
        write_text_encoder(place, _all_sentences())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    encoder = UMT5EncoderModel.from_pretrained(place, dtype=torch.float32)
    encoder.shared.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    lesson = _LESSONS[recipe.task](encoder).train()
    learned = [parameter for parameter in lesson.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=recipe.learning_rate, weight_decay=0.01)

    def take_step(step: int) -> dict[str, float]:
        factor = trapezoid(step, recipe.num_steps, recipe.warmup_steps, recipe.decay_share)
        set_learning_rate([optimiser], recipe.learning_rate * factor)
        rng = np.random.default_rng((recipe.seed, step))
        difficulty = min(1.0, 2 * step / recipe.num_steps)
        said = [say(draw_parts(rng), rng, difficulty * recipe.paraphrased) for _ in range(recipe.batch_size)]
        asked = _ask(tokenizer, said, np.random.default_rng((recipe.seed, step, 1)))
        embeddings = _disturbed(encoder.shared(asked.ids), difficulty, recipe, rng)
        with autocast(torch.device("cpu"), "bfloat16"):
            losses: dict[str, torch.Tensor] = lesson(asked, embeddings)
        optimiser.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        return {name: loss.item() for name, loss in losses.items()}

    state = {"lesson": lesson, "optimiser": optimiser}
    progress = fit(take_step, state, folder / "text_encoder.pt", recipe.num_steps, simulator())
    round_to_bfloat16(encoder)
    measured = {
        "recipe": asdict(recipe),
        "seconds": progress.seconds,
        "cpu_seconds": progress.cpu_seconds,
        "parameters": encoder.num_parameters(),
        **binding(tokenizer, encoder.eval(), recipe.num_held_out, recipe.seed),
    }
    (folder / "text_encoder.json").write_text(json.dumps(measured, indent=2))
    encoder.bfloat16().save_pretrained(place)
    logger.info("sides of pairs that were never trained: %s", measured["side"])
    return progress


def _all_sentences() -> list[str]:
    """Sentences that hold every word of captions and paraphrases."""
    return [
        *(wording for scene in SCENES for wording in scene.wordings),
        *(sentence for sentences in SCENE_PARAPHRASES.values() for sentence in sentences),
        *(synonym for synonyms in COLOUR_SYNONYMS.values() for synonym in synonyms),
        *(phrase for phrases in SIDE_PHRASES.values() for phrase in phrases),
        *(*_COLOURS, *_SIDES, "and", ","),
    ]


class _Asked(NamedTuple):
    """Sentences, `[B, L]` each.

    Attributes:
        ids: their tokens.
        mask: which tokens there are.
        products: per product the label of each token.
        is_missing: tokens that a lesson of missing words leaves out.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    products: list[torch.Tensor]
    is_missing: torch.Tensor


def _ask(tokenizer: PreTrainedTokenizerFast, said: list[Said], rng: np.random.Generator) -> _Asked:
    batch = tokenizer(
        [sentence.text for sentence in said],
        padding=True,
        max_length=MAX_SEQUENCE_LENGTH,
        truncation=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    labels = torch.full((3, *batch["input_ids"].shape), _IGNORED)
    starts, ends = batch["offset_mapping"].unbind(-1)
    for row, sentence in enumerate(said):
        for first, last, part in sentence.clauses:
            inside = (starts[row] >= first) & (ends[row] <= last) & (ends[row] > starts[row])
            scene, colour = _SCENES.index(part.scene.name), _COLOURS.index(part.colour)
            side = _SIDES.index(part.side)
            pairs = ((scene, side), (colour, side), (scene, colour))
            for number, ((a, b), (_, size)) in enumerate(zip(pairs, _PRODUCTS, strict=True)):
                labels[number, row, inside] = a * size + b
    draws = torch.rand(ends.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
    is_missing = (draws < _MISSING) & (ends > starts)  # what is no word has no characters
    return _Asked(batch["input_ids"], batch["attention_mask"], list(labels), is_missing)


def _disturbed(
    embeddings: torch.Tensor, difficulty: float, recipe: TextRecipe, rng: np.random.Generator
) -> torch.Tensor:
    """Word embeddings `[B, L, D]` with noise, some replaced by it."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(embeddings.shape, generator=generator)
    unknown = torch.rand(embeddings.shape[:2], generator=generator) < difficulty * recipe.unknown
    return torch.where(unknown[..., None], noise, embeddings + difficulty * recipe.blur * noise)


@torch.no_grad()
def binding(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, number: int, seed: int
) -> dict[str, float]:
    """How well a linear map tells the side of a named scene, from the mean over a sentence's tokens.

    It is fitted on captions of trained pairs, and measured on pairs that were never trained together; and on
    paraphrases of those.

    Args:
        tokenizer: the encoder's.
        encoder: what is measured.
        number: sentences of each kind.
        seed: decides which.
    """
    rng = np.random.default_rng((seed, 1))

    def states(split: Split, paraphrased: float) -> tuple[torch.Tensor, list[tuple[Part, ...]]]:
        pairs: list[tuple[Part, ...]] = []
        while len(pairs) < number:
            parts = draw_parts(rng, split)
            never = frozenset(part.phenomenon for part in parts) in HELD_OUT_PAIRS
            if len(parts) == 2 and never == (split == "held_out"):
                pairs.append(parts)
        said = [say(parts, rng, paraphrased).text for parts in pairs]
        batch = tokenizer(
            said, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
        )
        mask = batch["attention_mask"]
        found = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        mean = (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.cat([mean, torch.ones(len(mean), 1)], 1), pairs

    inputs, pairs = states("train", 0.0)
    targets = torch.zeros(len(pairs), len(_SCENES), 2)
    for row, parts in enumerate(pairs):
        for part in parts:
            targets[row, _SCENES.index(part.scene.name), _SIDES.index(part.side)] = 1
    ridge = 1e-3 * len(inputs) * torch.eye(inputs.shape[1]) * inputs.square().mean()
    probe = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets.flatten(1))

    def right(paraphrased: float) -> float:
        inputs, pairs = states("held_out", paraphrased)
        sides = (inputs @ probe).unflatten(1, (len(_SCENES), 2)).argmax(-1)
        return float(
            np.mean(
                [
                    sides[row, _SCENES.index(part.scene.name)] == _SIDES.index(part.side)
                    for row, parts in enumerate(pairs)
                    for part in parts
                ]
            )
        )

    return {"side": right(0.0), "side_paraphrased": right(1.0)}
