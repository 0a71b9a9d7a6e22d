"""What do the knobs of the embedded branch change, and where?

    python tests/benchmarks/knobs.py [CHECKPOINT NUM_CLIPS NUM_VIDEOS]

On true clips of two phenomena that were never trained together: how much larger the residuals are that the
branch injects, beside the stream; how far each knob moves the prediction, inside the mask of its phenomenon
against the rest of the frame, and against the knob of the other phenomenon there. Then on generated videos,
each beside the same seed without the knob: by how much the half changes where the phenomenon is, and the
other half. Intervals are of 95 %, by random subsets of clips.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.device import autocast
from prophy.evaluation.denoising import noise_like
from prophy.evaluation.generated import Request, make_videos
from prophy.evaluation.localization import mask_on_grid
from prophy.evaluation.statistics import estimate
from prophy.models.control import PhysicsControl
from prophy.pretraining.backbone import SAMPLING
from prophy.sandbox import Part, SimulatedClip, describe, held_out_combinations, play_parts
from prophy.tiny import bundled
from prophy.training.objectives import FlowMatching

NUM_CLIPS, NUM_VIDEOS = 48, 24
STRENGTH = 3.0
LEVELS = (0.6, 0.9)
GRID = (5, 8, 8)
_STRIDE = 7  # prime to the number of pairs: neighbours are of other phenomena


def pairs(number: int) -> list[tuple[Part, ...]]:
    """Two parts of phenomena that were never trained together."""
    found = [parts for parts in held_out_combinations() if len(parts) == 2]
    return [found[index * _STRIDE % len(found)] for index in range(number)]


class Predictions:
    """What the transformer predicts of clips at a level of noise, under knobs.

    Args:
        transformer: with a branch.
        clips: what is denoised.
        level: sigma.
    """

    def __init__(self, transformer: Any, clips: Sequence[SimulatedClip], level: float) -> None:
        encoder = VideoEncoder("tiny", None, "float32", "bfloat16", 32, family="wan")
        self._transformer = transformer
        latents = [encoder.encode_video(clip.frames[None])[0].float() for clip in clips]
        self._text = encoder.encode_text([clip.caption for clip in clips])["prompt_embeds"].float()
        objective = FlowMatching(3.0)
        self._timestep = objective.timesteps_at(torch.tensor([level]))
        self._noisy = [
            objective.add_noise(value[None], noise_like(value, str(index))[None], self._timestep)
            for index, value in enumerate(latents)
        ]

    @torch.no_grad()
    def __call__(self, index: int, **knobs: Any) -> torch.Tensor:
        """The prediction of one clip, `[C, T, H, W]`."""
        text = {"prompt_embeds": self._text[index : index + 1]}
        arguments = (self._noisy[index], self._timestep, text, PhysicsControl(**knobs))
        with autocast(self._transformer.device, "bfloat16"):
            return self._transformer.predict(*arguments).sample[0].float()

    def moved(self, index: int, **knobs: Any) -> np.ndarray:
        """Mean squared change of the prediction by knobs, of each token."""
        change = (self(index, **knobs) - self(index)).square().mean(0)
        return F.adaptive_avg_pool3d(change[None], GRID)[0].numpy()


def ratio(changes: Sequence[tuple[float, float]]) -> str:
    """Mean of the first by the second: geometric, since ratios are skewed."""
    found = estimate([float(np.log(first / second)) for first, second in changes if first > 0 and second > 0])
    if found is None:
        return "none"
    return "{:.2f} ({:.2f} to {:.2f})".format(*np.exp([found.mean, found.low, found.high]))


def share(values: Sequence[float]) -> str:
    """A mean share in per cent."""
    found = estimate(values)
    assert found is not None
    return f"{100 * found.mean:.2f} % ({100 * found.low:.2f} to {100 * found.high:.2f})"


def sizes(transformer: Any, clips: Sequence[SimulatedClip]) -> dict[str, list[float]]:
    """The norm of what each layer is given, by the norm of its tokens; of the refinement by itself too."""
    found: dict[str, list[float]] = {}
    branch, refined = transformer.physics_branch, []
    branch.refinement_injection.register_forward_hook(lambda *args: refined.append(args[2].float().norm()))
    layers = transformer.physics.physics_layers
    for layer in layers:
        block = transformer.blocks[layer]

        def measure(module: Any, inputs: Any, output: torch.Tensor, layer: int = layer) -> None:
            plain = module.run_block(*inputs[:4]).float()
            added = (output.float() - plain).norm() / plain.norm()
            found.setdefault(f"layer {layer}", []).append(added.item())
            if layer == layers[-1]:
                found.setdefault("the refinement there", []).append((refined.pop() / plain.norm()).item())

        block.register_forward_hook(measure)
    predictions = Predictions(transformer, clips, LEVELS[-1])
    for index in range(len(clips)):
        predictions(index)
    return found


def of_true_clips(transformer: Any, clips: Sequence[SimulatedClip]) -> Table:
    """How far knobs move predictions, and where."""
    table = Table("sigma", "knob", "prediction moves", "inside / outside", "against the other's knob there")
    whole: dict[str, dict[str, Any]] = {
        "scale 0": {"scale": 0.0},
        "scale 2": {"scale": 2.0},
        "experts inverted": {"invert_refinement": True},
    }
    for level in LEVELS:
        predictions = Predictions(transformer, clips, level)
        moves: dict[str, list[float]] = {}
        around: list[tuple[float, float]] = []
        against: list[tuple[float, float]] = []
        for index, clip in enumerate(clips):
            power = predictions(index).square().mean().item()
            for name, knobs in whole.items():
                moved = predictions.moved(index, **knobs).mean()
                moves.setdefault(name, []).append(float(np.sqrt(moved / power)))
            by_knob = {
                phenomenon: predictions.moved(index, strength={phenomenon: STRENGTH})
                for phenomenon in clip.phenomena
            }
            first, second = clip.phenomena
            for own, other in ((first, second), (second, first)):
                inside = mask_on_grid(clip.masks[own], GRID, "tokens")
                if not inside.any():
                    continue
                moved = by_knob[own].mean()
                moves.setdefault(f"strength {STRENGTH:g}", []).append(float(np.sqrt(moved / power)))
                around.append((by_knob[own][inside].mean(), by_knob[own][~inside].mean()))
                against.append((by_knob[own][inside].mean(), by_knob[other][inside].mean()))
        for name, values in moves.items():
            by_mask = (ratio(around), ratio(against)) if name.startswith("strength") else ("", "")
            table.add_row(f"{level:g}", name, share(values), *by_mask)
    return table


def of_videos(checkpoint: Path, number: int) -> Table:
    """By how much the halves of videos change under knobs."""
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, checkpoint)
    requests = [Request(describe(parts)[0], parts, index) for index, parts in enumerate(pairs(number))]

    def videos(knobs: Sequence[PhysicsControl]) -> list[np.ndarray]:
        """One video of each request, with knobs of its own."""
        return [
            next(make_videos(pipeline, [request], replace(SAMPLING, physics=physics)))
            for request, physics in zip(requests, knobs, strict=True)
        ]

    plain = videos([PhysicsControl()] * number)

    def halves(knobs: Sequence[PhysicsControl]) -> np.ndarray:
        """Mean absolute change of the left and the right half, of 255, `[N, 2]`."""
        changes = [np.abs(a.astype(float) - b) for a, b in zip(videos(knobs), plain, strict=True)]
        return np.array([[part.mean() for part in np.split(change, 2, axis=2)] for change in changes])

    of_left, of_right = (
        halves([PhysicsControl(strength={request.parts[side].phenomenon: STRENGTH}) for request in requests])
        for side in (0, 1)
    )
    rows = {
        f"strength {STRENGTH:g} of what is on the left": of_left,
        f"strength {STRENGTH:g} of what is on the right": of_right,
        "experts inverted": halves([PhysicsControl(invert_refinement=True)] * number),
        "scale 0": halves([PhysicsControl(scale=0.0)] * number),
    }
    own, other = np.stack([of_left[:, 0], of_right[:, 1]], 1), np.stack([of_left[:, 1], of_right[:, 0]], 1)
    foreign = np.stack([of_right[:, 0], of_left[:, 1]], 1)
    around = ratio([*zip(own.mean(1), other.mean(1), strict=True)])
    against = ratio([*zip(own.mean(1), foreign.mean(1), strict=True)])
    title = f"{number} videos; own half by the other {around}; by the other's knob there {against}"
    table = Table("knob", "left half, of 255", "right half, of 255", title=title)
    for name, changed in rows.items():
        cells = []
        for column in changed.T:
            found = estimate(column)
            assert found is not None
            cells.append(f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=bundled("branch"))
    parser.add_argument("num_clips", nargs="?", type=int, default=NUM_CLIPS)
    parser.add_argument("num_videos", nargs="?", type=int, default=NUM_VIDEOS)
    given = parser.parse_args()
    console = Console(width=120)
    transformer = load_pipeline("wan", "tiny", None, torch.float32, given.checkpoint).transformer
    shape: dict[str, Any] = {"num_frames": SAMPLING.num_frames, "fps": SAMPLING.fps, "size": SAMPLING.size}
    clips = [
        play_parts(parts, np.random.default_rng((index, 5)), **shape)
        for index, parts in enumerate(pairs(given.num_clips))
    ]
    console.print(of_true_clips(transformer, clips))
    for name, values in sizes(transformer, clips).items():
        console.print(f"{name}: {share(values)} of the stream's norm at sigma {LEVELS[-1]:g}")
    console.print(of_videos(given.checkpoint, given.num_videos))


if __name__ == "__main__":
    main()
