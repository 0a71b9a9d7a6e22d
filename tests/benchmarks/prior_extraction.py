"""Claim: one prefill per clip and kept attention rows make priors several times cheaper than asking singly.

Three ways to ask a Qwen2.5-VL the same questions about the same clips, each in a process of its own:
naive (stock `generate` per question, eager, `output_attentions=True`: every layer, every token), ours without
the shared prefix (one prefill per question; only the rows of answer tokens are kept), and ours. The model,
the clips, the questions and the number of answer tokens are the same everywhere, loading is not measured.
That the maps are equal is tested in tests/priors/test_vlm.py.

    python tests/benchmarks/prior_extraction.py    # the embedded VLM, under a minute on 2 cores
    python tests/benchmarks/prior_extraction.py --model Qwen/Qwen2.5-VL-7B-Instruct --size 448 --frames 16
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prophy.priors.questionnaire import questionnaire
from prophy.priors.qwen_vl import Qwen25VL
from prophy.priors.vlm import load_vlm
from tests.wisa import WISA

QUESTIONS = [question.text for question in questionnaire(WISA)[:6]]
FPS = 4.0


def naive(vlm: Qwen25VL, frames: np.ndarray, num_tokens: int) -> None:
    """A full run per question by transformers alone, with all of its attention."""
    patches, grid = vlm.pixels(frames)
    num_video_tokens = int(grid.prod()) // vlm.model.config.vision_config.spatial_merge_size**2
    device = vlm.model.device
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
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        columns = is_video[0].nonzero()[:, 0].to(device)
        rows = [layer[0, :, -1, columns] for step in generated.attentions[1:] for layer in step]
        torch.stack(rows).float().mean((0, 1)).cpu()


def without_sharing(vlm: Qwen25VL, frames: np.ndarray, num_tokens: int) -> None:
    """Our attention, but the video is read again for each question."""
    for question in QUESTIONS:
        vlm.answer(vlm.watch(frames, FPS), [question], num_tokens, range(vlm.num_layers))


def ours(vlm: Qwen25VL, frames: np.ndarray, num_tokens: int) -> None:
    """One prefill, all questions as one batch."""
    vlm.answer(vlm.watch(frames, FPS), QUESTIONS, num_tokens, range(vlm.num_layers))


WAYS: dict[str, Callable[[Qwen25VL, np.ndarray, int], None]] = {
    "naive": naive,
    "ours without prefix sharing": without_sharing,
    "ours": ours,
}


def memory_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds per clip and peak memory beyond the loaded model, of `options.way`."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    vlm = load_vlm(options.model, None, dtype, None)
    assert isinstance(vlm, Qwen25VL)
    vlm.end_tokens = torch.tensor([-1], device=vlm.model.device)  # all answers are equally long
    if options.way == "naive":
        vlm.model.set_attn_implementation("eager")
    generator = np.random.default_rng(0)
    shape = (options.frames, options.size, options.size, 3)
    clips = [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(options.clips + 1)]
    before = memory_mb("VmRSS")
    WAYS[options.way](vlm, clips[0], options.tokens)  # buffers and kernels; not timed
    start = time.perf_counter()
    for clip in clips[1:]:
        WAYS[options.way](vlm, clip, options.tokens)
    seconds = (time.perf_counter() - start) / options.clips
    if torch.cuda.is_available():
        return {"seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 2**20}
    return {"seconds": seconds, "peak_mb": memory_mb("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="height and width of a frame, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--save", type=Path, help="a JSON file for the results")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    table = Table("way", "s per clip", "faster", "peak MB", "less memory")
    reference = results["naive"]
    for way, result in results.items():
        faster = reference["seconds"] / result["seconds"]
        less = reference["peak_mb"] / result["peak_mb"]
        table.add_row(
            way, f"{result['seconds']:.3f}", f"{faster:.1f}x", f"{result['peak_mb']:.0f}", f"{less:.1f}x"
        )
    Console().print(table)
    if options.save:
        settings = {key: value for key, value in vars(options).items() if key not in ("way", "save")}
        settings |= {
            "questions": len(QUESTIONS),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        options.save.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
