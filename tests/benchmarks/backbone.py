"""Is what the embedded default generates what was asked for, and does it fall as things fall?

    python tests/benchmarks/backbone.py [NUM_FALLS NUM_WORDINGS]

By rules on pixels. Prompts for combinations of phenomenon, colour and side that were never trained; for pairs
of phenomena that were never trained together; paraphrases that no caption holds; bouncing balls, whose
acceleration is fitted. Intervals are of 95 %, over videos. Beside them the same rulers on true clips and on
the VAE's reconstructions of them: the ceiling.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prophy.backbones.loading import load_pipeline
from prophy.evaluation.generated import (
    Request,
    Sampling,
    fall_requests,
    held_out_requests,
    judge_videos,
    make_videos,
    measure_falls,
)
from prophy.evaluation.semantics import PartVerdict
from prophy.evaluation.statistics import estimate
from prophy.pretraining.backbone import SAMPLING
from prophy.pretraining.vae import reconstruct
from prophy.sandbox import PHENOMENA, SCENES, WORLD_M, Part, play_parts
from prophy.sandbox.scene import GRAVITY_M_S2

NUM_FALLS = 48
NUM_WORDINGS = 4  # prompts of each combination, or all where it has fewer
FALLS_HEADER = (
    "falls",
    "fitted",
    "acceleration, m/s^2",
    "within 30 % of g",
    "residual, m",
    "frames with a ball",
    "with several",
)
SCENE = {scene.name: scene for scene in SCENES}
PARAPHRASES = (
    ("a crimson sphere drops on the left", "bouncing_ball", "red", "left"),
    ("on the right, a lime ball falls down and hops", "bouncing_ball", "green", "right"),
    ("a violet pendulum is moving to and fro on the left", "pendulum", "purple", "left"),
    ("a cyan disc rolls down an incline on the right", "rolling_wheel", "turquoise", "right"),
    ("wobbly red jello on the right", "jelly", "red", "right"),
    ("golden water is running into a basin on the left", "pouring_liquid", "yellow", "left"),
    ("blue fumes come out of a chimney on the right", "smoke", "blue", "right"),
    ("a machine crushes an emerald cube on the left", "press", "green", "left"),
    ("a block of scarlet ice is melting away on the left", "melting_block", "red", "left"),
    ("a purple fluid turns to ice on the right", "freezing_tank", "purple", "right"),
    ("a kettle of teal water is boiling on the left", "boiling_pot", "turquoise", "left"),
    ("azure droplets condense on a chilled surface on the right", "condensing_vapor", "blue", "right"),
    ("a lit candle made of green wax on the right", "candle", "green", "right"),
    ("on the left a lemon yellow bomb goes off", "bomb", "yellow", "left"),
    ("a magenta laser bounces off a mirror on the left", "mirror", "purple", "left"),
    ("a ray of indigo light is refracted by glass on the right", "glass_block", "blue", "right"),
    ("a red ray of light is diffused by mist on the left", "foggy_beam", "red", "left"),
    ("a double slit makes a pattern of green stripes on the right", "two_slits", "green", "right"),
    ("someone turns on a yellow light bulb on the right", "lamp", "yellow", "right"),
)


def true_videos(requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
    """Simulated clips of what is asked."""
    shape: dict[str, Any] = {"num_frames": sampling.num_frames, "fps": sampling.fps, "size": sampling.size}
    return [
        play_parts(request.parts, np.random.default_rng((request.seed, 1)), **shape).frames
        for request in requests
    ]


def rates(verdicts: Sequence[Sequence[PartVerdict]]) -> list[str]:
    """Shares of parts with the right phenomenon on the right side, the right colour there, and both."""
    right = [
        [(part.phenomenon, part.colour, part.phenomenon and part.colour) for part in video]
        for video in verdicts
    ]
    # All videos of a row have as many parts.
    of_videos = np.array([np.mean(video, axis=0) for video in right]).T
    return [str(sum(map(len, right))), *map(_share, of_videos)]


def _share(values: np.ndarray) -> str:
    """A mean in per cent, with its interval where there are enough videos for one."""
    found = estimate([*values])
    between = "" if found is None else f" ({100 * found.low:.0f} to {100 * found.high:.0f})"
    return f"{100 * values.mean():.1f} %{between}"


def falls_row(videos: Sequence[np.ndarray], requests: Sequence[Request], sampling: Sampling) -> list[str]:
    """Falls that follow a law, their accelerations, those near g; how well, and how often there is a ball."""
    falls = measure_falls(videos, requests, sampling, sampling.size / WORLD_M)
    found = [fall.acceleration_m_s2 for fall in falls if fall.acceleration_m_s2 is not None]
    low, middle, high = np.percentile(found, [10, 50, 90]) if found else (np.nan,) * 3
    return [
        f"{len(found)} of {len(falls)}",
        f"{middle:.1f} ({low:.1f} to {high:.1f})",
        f"{100 * np.mean([fall.obeys(GRAVITY_M_S2) for fall in falls]):.0f} %",
        f"{np.median([fall.residual_m for fall in falls if fall.residual_m is not None]):.2f}",
        f"{100 * np.mean([fall.seen for fall in falls]):.0f} %",
        f"{100 * np.mean([fall.split for fall in falls]):.0f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("num_falls", nargs="?", type=int, default=NUM_FALLS)
    parser.add_argument("num_wordings", nargs="?", type=int, default=NUM_WORDINGS)
    given = parser.parse_args()
    console = Console(width=110)
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, None)
    requests = held_out_requests(given.num_wordings)
    began = time.perf_counter()
    videos = list(make_videos(pipeline, requests, SAMPLING))
    console.print(
        f"{(time.perf_counter() - began) / len(videos):.2f} s per video, {torch.get_num_threads()} threads"
    )
    verdicts = judge_videos(videos, requests, SAMPLING)
    paraphrases = [
        Request(prompt, (Part(SCENE[scene], colour, side),), index)
        for index, (prompt, scene, colour, side) in enumerate(PARAPHRASES)
    ]

    header = ("parts", "phenomenon, side", "colour", "all right")
    table = Table("held-out combinations", *header, title="what was asked")
    alone, in_pairs = ([video for video in verdicts if len(video) == number] for number in (1, 2))
    by_phenomenon = defaultdict(list)
    for video in alone:
        by_phenomenon[video[0].part.phenomenon].append(video)
    for phenomenon in PHENOMENA:
        table.add_row(phenomenon, *rates(by_phenomenon[phenomenon]))
    table.add_section()
    table.add_row("all of these, alone in a video", *rates(alone))
    table.add_row("two in a video, a pair never trained", *rates(in_pairs))
    true = judge_videos(true_videos(requests, SAMPLING), requests, SAMPLING)
    for number, how_many in ((1, "alone"), (2, "two")):
        of_number = [video for video in true if len(video) == number]
        table.add_row(f"true clips (the judge itself), {how_many} in a video", *rates(of_number))
    said = judge_videos(list(make_videos(pipeline, paraphrases, SAMPLING)), paraphrases, SAMPLING)
    table.add_row("paraphrases", *rates(said))
    console.print(table)
    for request, [part] in zip(paraphrases, said, strict=True):
        if not (part.phenomenon and part.colour):
            console.print(f"  not right: {request.prompt!r}")

    falls = fall_requests(given.num_falls)
    truth = true_videos(falls, SAMPLING)
    table = Table(*FALLS_HEADER, title="gravity")
    table.add_row("true clips", *falls_row(truth, falls, SAMPLING))
    table.add_row("VAE reconstructions", *falls_row(list(reconstruct(pipeline.vae, truth)), falls, SAMPLING))
    table.add_row("generated", *falls_row(list(make_videos(pipeline, falls, SAMPLING)), falls, SAMPLING))
    console.print(table)


if __name__ == "__main__":
    main()
