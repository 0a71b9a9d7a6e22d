"""Trains the embedded VLM to answer the questionnaire about simulated clips.

One packed sequence per clip: the video once, then all questions with their true answers side by side, each
seeing only the video and itself. Extraction computes the same, with one batch row per question. Answers name
no side: the network gets no coordinates, and would spend most of the training on left and right.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prophy.device import autocast
from prophy.pretraining.muon import Muon
from prophy.pretraining.recipe import (
    FPS,
    NUM_FRAMES,
    SIZE,
    Progress,
    fit,
    held_out_clips,
    round_to_bfloat16,
    set_learning_rate,
    simulator,
    trapezoid,
)
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.questionnaire import (
    BACKGROUND,
    CAPTION,
    Question,
    ask_presence,
    describe_named,
    format_presence,
)
from prophy.priors.qwen_vl import Qwen25VL
from prophy.sandbox import ClipTruth, Part, SimulatedClip, simulate_clip
from prophy.sandbox import describe as wordings
from prophy.taxonomy import Taxonomy
from prophy.tiny.vlm import ABSENT_ANSWER, BACKGROUND_ANSWER, write_vlm

logger = logging.getLogger(__name__)

VLM_NUM_FRAMES = 8
VLM_FPS = FPS * (VLM_NUM_FRAMES - 1) / (NUM_FRAMES - 1)
_MAX_NEW_TOKENS = 40
_IGNORED = -100  # label of tokens that are not learned
_IN_BLOCK = re.compile(r"\.(layers|blocks)\.\d+\.")
_PREFIX, _PADDING = -1, -2  # branches of the packed sequence; questions count from 0


@dataclass(frozen=True, kw_only=True)
class VlmRecipe:
    """How the VLM is trained.

    Attributes:
        num_steps: optimiser steps, each on clips that were never seen before.
        num_held_out: clips to measure on.
        seed: decides weights and draws.
        batch_size: clips in a step.
        learning_rate: Muon's, for the matrices inside the blocks; AdamW's, for the rest, is half of it.
        weight_decay: weight decay of matrices.
        warmup_steps: steps until the learning rate is reached.
        decay_share: last share of the steps, in which it falls to zero.
        validate_every: steps between validations.
    """

    num_steps: int
    num_held_out: int = 200
    seed: int = 0
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 30
    decay_share: float = 0.5
    validate_every: int = 100


def pretrain_vlm(folder: Path, recipe: VlmRecipe, taxonomy: Taxonomy) -> Progress:
    """Trains, measures and saves; goes on where it was cut off.

    Writes `vlm/` (transformers' layout, bfloat16) and `vlm.json` (recipe and measurements) in `folder`; keeps
    `vlm.pt` there. The taxonomy names all that simulated clips show.
    """
    if not (folder / "vlm.pt").exists():
        write_vlm(folder / "vlm", taxonomy)
    vlm = Qwen25VL(str(folder / "vlm"), "main", "float32", None)
    model = vlm.model
    matrices = [p for name, p in model.named_parameters() if _IN_BLOCK.search(name) and p.ndim == 2]
    in_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_muon]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    held_out = held_out_clips(recipe.num_held_out)

    def take_step(step: int) -> dict[str, float]:
        factor = trapezoid(step, recipe.num_steps, recipe.warmup_steps, recipe.decay_share)
        for optimiser, share in zip(optimisers, (1.0, 0.5), strict=True):
            set_learning_rate([optimiser], recipe.learning_rate * factor * share)
        rng = np.random.default_rng((recipe.seed, step))
        clips = [
            simulate_clip(int(seed), num_frames=NUM_FRAMES, fps=FPS, size=SIZE)
            for seed in rng.integers(2**31, size=recipe.batch_size)
        ]
        model.train()
        with autocast(model.device, "bfloat16"):
            loss = model(**pack(vlm, taxonomy, clips, rng)).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        measured = {"loss": loss.item()}
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.num_steps:
            measured["validation"] = _validate(vlm, taxonomy, held_out[: 8 * recipe.batch_size], recipe)
        return measured

    state = {"model": model, "muon": optimisers[0], "adamw": optimisers[1]}
    progress = fit(take_step, state, folder / "vlm.pt", recipe.num_steps, simulator())
    round_to_bfloat16(model)
    model.to(torch.bfloat16).save_pretrained(folder / "vlm")
    measured = {
        "recipe": asdict(recipe),
        "seconds": progress.seconds,
        "cpu_seconds": progress.cpu_seconds,
        "parameters": model.num_parameters(),
        **extraction_quality(str(folder / "vlm"), taxonomy, held_out),
    }
    (folder / "vlm.json").write_text(json.dumps(measured, indent=2))
    logger.info("phenomena %.3f, captions %.3f", measured["phenomena"], measured["captions"])
    return progress


def vlm_frames(frames: np.ndarray) -> np.ndarray:
    """The frames of a clip, `[T, H, W, 3]`, that the VLM sees: evenly spaced, first and last included."""
    return frames[np.linspace(0, len(frames) - 1, VLM_NUM_FRAMES).round().astype(int)]


def true_answers(taxonomy: Taxonomy, clip: ClipTruth, rng: np.random.Generator) -> list[tuple[Question, str]]:
    """Questions about a clip with true answers: all that extraction asks, and one phenomenon that is absent.

    Wordings are drawn from those that are true.
    """
    parts = _without_sides(clip.parts)
    said = {str(part.phenomenon): str(rng.choice(wordings((part,)))) for part in parts}
    absent = str(rng.choice([name for name in taxonomy.names if name not in said]))
    answers = said | {absent: f"{ABSENT_ANSWER} {absent}"}
    return [
        (CAPTION, str(rng.choice(wordings(parts)))),
        (ask_presence(taxonomy), format_presence(clip.phenomena)),
        (BACKGROUND, BACKGROUND_ANSWER),
        *zip(describe_named(taxonomy, answers), answers.values(), strict=True),
    ]


def _without_sides(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(replace(part, side="middle") for part in parts)


def pack(
    vlm: Qwen25VL, taxonomy: Taxonomy, clips: Sequence[SimulatedClip], rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward for a batch of clips, loss included.

    A token sees the video and what precedes it in its own question: an additive mask `[B, 1, L, L]`. Every
    question's positions go on from the video, as if it were the only one.
    """
    pixels = [vlm.pixels(vlm_frames(clip.frames)) for clip in clips]
    grid = pixels[0][1]
    prefix, prefix_positions, next_position = vlm.video_tokens(grid, VLM_FPS)

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(vlm.tokenizer(text, add_special_tokens=False).input_ids)

    rows = []
    for clip in clips:
        parts = [(prefix[0], torch.full_like(prefix[0], _IGNORED), _PREFIX, prefix_positions[:, 0])]
        for branch, (question, answer) in enumerate(true_answers(taxonomy, clip, rng)):
            asked = tokens(vlm.split_prompt(question.text)[1])
            said = tokens(answer + vlm.tokenizer.eos_token)
            ids = torch.cat([asked, said])
            labels = torch.cat([torch.full_like(asked, _IGNORED), said])
            parts.append((ids, labels, branch, (next_position + torch.arange(len(ids))).expand(3, -1)))
        rows.append(
            (
                torch.cat([ids for ids, *_ in parts]),
                torch.cat([labels for _, labels, *_ in parts]),
                torch.cat([torch.full_like(ids, branch) for ids, _, branch, _ in parts]),
                torch.cat([positions for *_, positions in parts], 1).T,
            )
        )
    ids, labels, branches, positions = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=value)
        for part, value in zip(
            zip(*rows, strict=True), (vlm.tokenizer.pad_token_id, _IGNORED, _PADDING, 0), strict=True
        )
    )
    visible = (branches[:, :, None] == branches[:, None]) | (branches[:, None] == _PREFIX)
    visible &= torch.ones(visible.shape[1:], dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask[:, None],
        "position_ids": positions.permute(2, 0, 1),
        "pixel_values_videos": torch.cat([patches for patches, _ in pixels]),
        "video_grid_thw": grid.expand(len(clips), -1),
    }


@torch.no_grad()
def _validate(vlm: Qwen25VL, taxonomy: Taxonomy, clips: Sequence[SimulatedClip], recipe: VlmRecipe) -> float:
    """Mean loss on clips with a combination that was never trained."""
    vlm.model.eval()
    losses = []
    for start in range(0, len(clips), recipe.batch_size):
        rng = np.random.default_rng((recipe.seed, start))
        with autocast(vlm.model.device, "bfloat16"):
            batch = pack(vlm, taxonomy, clips[start : start + recipe.batch_size], rng)
            losses.append(vlm.model(**batch).loss.item())
    return float(np.mean(losses))


def extraction_quality(
    pretrained: str, taxonomy: Taxonomy, clips: Sequence[SimulatedClip]
) -> dict[str, float]:
    """Shares of what extraction gets right: (clip, phenomenon) pairs, label sets, captions, descriptions."""
    extractor = PriorExtractor(pretrained, taxonomy, dtype="float32", max_new_tokens=_MAX_NEW_TOKENS)
    presence, sets, captions, described = [], [], [], []
    for clip in clips:
        [named] = extractor([Clip(vlm_frames(clip.frames), VLM_FPS)])
        presence += [(name in named.phenomena) == (name in clip.phenomena) for name in taxonomy.names]
        sets.append(named.phenomena == clip.phenomena)
        parts = _without_sides(clip.parts)
        captions.append(named.vlm_caption in wordings(parts))
        described += [named.answers.get(part.phenomenon) in wordings((part,)) for part in parts]
    return {
        "presence": float(np.mean(presence)),
        "phenomena": float(np.mean(sets)),
        "captions": float(np.mean(captions)),
        "descriptions": float(np.mean(described)),
    }
