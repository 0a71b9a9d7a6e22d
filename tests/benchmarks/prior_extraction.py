"""Claim: one prefill per clip, kept attention rows and batches make priors several times cheaper.

Ways to ask a Qwen2.5-VL the same questions about the same clips:

- naive: stock `generate` per question, eager, `output_attentions=True`: every layer, every token;
- clip by clip: the questions as rows with a copy of the prefix each, attention kept at every step;
- ours, in batches of 1, 4 and 8 clips.

The model, the clips, the questions and the number of answer tokens are the same everywhere; loading is not
measured. All ways take turns in one process, round after round, and a way's figure is the median of its
rounds' ratios to "clip by clip", so that what else the machine does weighs on all alike. Memory is the peak
of a process that does nothing else, on one batch, beyond the loaded model. That the maps are equal is tested
in tests/priors/test_vlm.py; the last column prints by how much they differ here from "clip by clip".

    python tests/benchmarks/prior_extraction.py    # the embedded VLM, minutes on 2 cores
    python tests/benchmarks/prior_extraction.py --model Qwen/Qwen2.5-VL-7B-Instruct --size 448 --frames 16
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from prophy.priors.attention import ATTENTION
from prophy.priors.questionnaire import questionnaire
from prophy.priors.qwen_vl import Qwen25VL
from prophy.priors.vlm import load_vlm
from prophy.sandbox import simulate_clip
from prophy.taxonomy import load_taxonomy

WISA = load_taxonomy("wisa")
QUESTIONS = [question.text for question in questionnaire(WISA)[:6]]
FPS = 4.0
BATCH_SIZES = (1, 4, 8)
REFERENCE = "clip by clip"

Maps = list[torch.Tensor]  # `[questions, V]` of each clip


def naive(vlm: Qwen25VL, clips: Sequence[np.ndarray], num_tokens: int) -> Maps:
    """A full run per question by transformers alone, with all of its attention."""
    device = vlm.model.device
    vlm.model.set_attn_implementation("eager")
    maps = []
    for frames in clips:
        patches, grid = vlm.pixels(frames)
        num_video_tokens = int(grid.prod()) // vlm.model.config.vision_config.spatial_merge_size**2
        looks = []
        for question in QUESTIONS:
            head, tail = vlm.split_prompt(question)
            video = vlm.tokenizer.convert_ids_to_tokens(vlm.model.config.video_token_id) * num_video_tokens
            ids = vlm.tokenizer(head + video + tail, add_special_tokens=False, return_tensors="pt").input_ids
            is_video = ids == vlm.model.config.video_token_id
            generated = vlm.model.generate(
                input_ids=ids.to(device),
                attention_mask=torch.ones_like(ids).to(device),
                mm_token_type_ids=(is_video * 2).to(device),
                pixel_values_videos=patches.to(device),
                video_grid_thw=grid.to(device),
                second_per_grid_ts=torch.tensor([2 / FPS]),
                # One more: what generates a token is the attention of the one before it.
                min_new_tokens=num_tokens + 1,
                max_new_tokens=num_tokens + 1,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
            columns = is_video[0].nonzero()[:, 0].to(device)
            rows = [layer[0, :, -1, columns] for step in generated.attentions[1:] for layer in step]
            looks.append(torch.stack(rows).float().mean((0, 1)).cpu())
        maps.append(torch.stack(looks))
    vlm.model.set_attn_implementation(ATTENTION)
    return maps


class LastTokenAttention:
    """Adds up, at each step, where the one query token of each row looks."""

    def __init__(self, layers: range, video: torch.Tensor) -> None:
        self.layers = layers
        self.video = video
        self.sum = torch.zeros((), device=video.device)

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float) -> None:
        grouped = query.reshape(*key.shape[:2], -1, key.shape[-1])
        scores = ((grouped @ key.transpose(-1, -2)).float() * scaling).masked_fill(~mask, -torch.inf)
        rows = scores.softmax(-1).index_select(-1, self.video)
        self.sum = self.sum + rows.mean((1, 2)) / len(self.layers)


def clip_by_clip(vlm: Qwen25VL, clips: Sequence[np.ndarray], num_tokens: int) -> Maps:
    """The questions about a clip as rows of a batch, each with a copy of its prefix."""
    maps, size = [], len(QUESTIONS)
    for frames in clips:
        [video] = vlm.watch([frames], [FPS])
        tails = [vlm.split_prompt(question)[1] for question in QUESTIONS]
        tokenized = vlm.tokenizer(
            tails, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(vlm.model.device)
        tokens, mask = tokenized.input_ids, tokenized.attention_mask
        positions = video.next_position - 1 + mask.cumsum(1)
        mask = torch.cat([mask.new_ones(size, video.length), mask], 1)
        cache = DynamicCache(
            [
                (keys.expand(size, -1, -1, -1), values.expand(size, -1, -1, -1))
                for keys, values in video.layers
            ]
        )
        attention = LastTokenAttention(range(vlm.num_layers), video.video)
        for step in range(num_tokens + 1):
            logits = vlm.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions.expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                video_attention=attention if step else None,
            ).logits[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
            mask, positions = torch.cat([mask, mask.new_ones(size, 1)], 1), positions[:, -1:] + 1
        maps.append(attention.sum.cpu() / num_tokens)
    return maps


def batches(vlm: Qwen25VL, clips: Sequence[np.ndarray], num_tokens: int, *, size: int) -> Maps:
    """What the product does."""
    maps = []
    for start in range(0, len(clips), size):
        batch = clips[start : start + size]
        videos = vlm.watch(batch, len(batch) * [FPS])
        answers = vlm.answer(videos, len(batch) * [QUESTIONS], num_tokens, range(vlm.num_layers))
        maps += [torch.stack([answer.attention.flatten() for answer in each]) for each in answers]
    return maps


WAYS: dict[str, Callable[[Qwen25VL, Sequence[np.ndarray], int], Maps]] = {
    "naive": naive,
    REFERENCE: clip_by_clip,
    **{f"ours, batch {size}": partial(batches, size=size) for size in BATCH_SIZES},
}


def load(options: argparse.Namespace) -> tuple[Qwen25VL, list[np.ndarray]]:
    """The model, which never ends an answer by itself, and the clips."""
    vlm = load_vlm(options.model, None, "bfloat16" if torch.cuda.is_available() else "float32", None)
    assert isinstance(vlm, Qwen25VL)
    vlm.end_tokens = frozenset()
    clips = [
        simulate_clip(seed, num_frames=options.frames, fps=FPS, size=options.size).frames
        for seed in range(max(BATCH_SIZES))
    ]
    return vlm, clips


def memory_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


@torch.inference_mode()
def peak_mb(options: argparse.Namespace) -> float:
    """Memory that a batch of `options.way` takes, beyond the loaded model."""
    vlm, clips = load(options)
    before = memory_mb("VmRSS")
    size = int(options.way.rpartition(" ")[2]) if options.way.startswith("ours") else 1
    WAYS[options.way](vlm, clips[:size], options.tokens)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return memory_mb("VmHWM") - before


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per clip, ratio to the reference, and largest difference of a map from the reference's."""
    vlm, clips = load(options)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    maps: dict[str, Maps] = {}
    for number in range(options.rounds + 1):
        for way, run in WAYS.items():
            some = clips[: 1 if way == "naive" else None]
            start = time.perf_counter()
            maps[way] = run(vlm, some, options.tokens)
            if number:  # the first round makes buffers and kernels
                seconds[way].append((time.perf_counter() - start) / len(some))
    return {
        way: {
            "seconds": float(np.median(seconds[way])),
            "faster": float(np.median(np.divide(seconds[REFERENCE], seconds[way]))),
            "difference": max(
                (one - other).abs().max().item()
                for one, other in zip(maps[way], maps[REFERENCE], strict=False)  # the naive way sees one
            ),
        }
        for way in WAYS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of a frame, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="a JSON file for the results")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(peak_mb(options)))
        return
    results = measure(options)
    for way, result in results.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result["peak_mb"] = json.loads(output.splitlines()[-1])
    table = Table("way", "clips/s", f"times {REFERENCE}", "peak MB", "maps differ by")
    for way, result in results.items():
        table.add_row(
            way,
            f"{1 / result['seconds']:.2f}",
            f"{result['faster']:.2f}",
            f"{result['peak_mb']:.0f}",
            f"{result['difference']:.0e}",
        )
    Console().print(table)
    if options.save:
        settings = {key: value for key, value in vars(options).items() if key not in ("way", "save")}
        settings |= {"questions": len(QUESTIONS), "torch": torch.__version__}
        options.save.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
