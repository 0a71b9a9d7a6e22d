"""How good are generated clips? What is asked of a model of sandbox clips, and how its answers are scored.

Combinations of phenomenon, colour and side that were never trained, and falls that must obey gravity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

import numpy as np
import torch
from diffusers import DiffusionPipeline

from prophy.device import autocast
from prophy.evaluation.motion import Fall, measure_fall
from prophy.evaluation.semantics import ClipJudge, PartVerdict
from prophy.models.control import PhysicsControl
from prophy.sandbox import COLOURS, SCENES, Part, describe, held_out_combinations

_VIDEOS_PER_BATCH = 4
_FIRST_FALL_SEED = 10_000


@dataclass(frozen=True)
class Request:
    """A prompt, what it asks for, and the seed of its noise."""

    prompt: str
    parts: tuple[Part, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How every video is made.

    Attributes:
        num_frames: frames.
        fps: frame rate, which only the scores know.
        size: height and width in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance.
        physics: knobs of the Physical Branch; None where there is no branch.
    """

    num_frames: int
    fps: float
    size: int
    num_inference_steps: int
    guidance_scale: float
    physics: PhysicsControl | None = None


def held_out_requests(wordings: int = 2) -> list[Request]:
    """Every held-out (phenomenon, colour, side) in each of its scenes, and every held-out pair.

    Args:
        wordings: prompts of each, with different words and seeds.
    """
    return [
        Request(str(prompt), parts, wordings * number + index)
        for number, parts in enumerate(held_out_combinations())
        for index, prompt in enumerate(np.random.default_rng(number).permutation(describe(parts))[:wordings])
    ]


def fall_requests(number: int) -> list[Request]:
    """Bouncing balls of every colour, on either side, in every wording, over and over with new seeds."""
    [scene] = [scene for scene in SCENES if scene.name == "bouncing_ball"]
    parts = [Part(scene, colour, side) for colour, side in product(COLOURS, ("left", "right"))]
    prompts = cycle([(prompt, part) for part in parts for prompt in describe((part,))])
    return [
        Request(prompt, (part,), _FIRST_FALL_SEED + index)
        for index, (prompt, part) in enumerate(islice(prompts, number))
    ]


def make_videos(
    pipeline: DiffusionPipeline, requests: Sequence[Request], sampling: Sampling
) -> Iterator[np.ndarray]:
    """The videos of the requests, in their order: uint8 `[T, H, W, 3]` each."""
    pipeline.set_progress_bar_config(disable=True)
    control = {} if sampling.physics is None else {"physics": sampling.physics}
    waiting = iter(requests)
    while batch := list(islice(waiting, _VIDEOS_PER_BATCH)):
        with autocast(pipeline.device, "bfloat16"):
            videos = pipeline(
                [request.prompt for request in batch],
                height=sampling.size,
                width=sampling.size,
                num_frames=sampling.num_frames,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
                output_type="np",
                **control,
            ).frames
        yield from (np.clip(videos, 0, 1) * 255).round().astype(np.uint8)


def judge_videos(
    videos: Sequence[np.ndarray], requests: Sequence[Request], sampling: Sampling
) -> list[list[PartVerdict]]:
    """What is right about each part of each request."""
    judge = ClipJudge(sampling.num_frames, sampling.fps, sampling.size)
    return [judge.judge(video, request.parts) for video, request in zip(videos, requests, strict=True)]


def measure_falls(
    videos: Sequence[np.ndarray], requests: Sequence[Request], sampling: Sampling, pixels_per_m: float
) -> list[Fall]:
    """How the ball of each request fell."""
    return [
        measure_fall(
            video,
            colour=request.parts[0].colour,
            side=request.parts[0].side,
            fps=sampling.fps,
            pixels_per_m=pixels_per_m,
        )
        for video, request in zip(videos, requests, strict=True)
    ]
