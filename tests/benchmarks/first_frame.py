"""Does the embedded backbone go on from a first frame as the simulator does?

    python tests/benchmarks/first_frame.py [FOLDER NUM_CLIPS]

Videos are kept in FOLDER (runs/first_frame), below a name of the weights and the sandbox, and the same
command goes on with them. Two sets of clips of
combinations that were never trained: of every phenomenon, for which what is drawn is held against the true
clip, and of one coloured body alone, whose place is followed. Beside the videos of first frame and caption:
those of the caption alone, the first frame repeated, and the true clip through the VAE, which is the most
that can be reached.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint
from prophy.device import autocast
from prophy.evaluation.generated import Request, make_videos
from prophy.evaluation.motion import follow
from prophy.evaluation.shapes import drawn
from prophy.evaluation.statistics import Estimate, compare, estimate
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.pretraining.backbone import SAMPLING
from prophy.pretraining.recipe import held_out_clips, simulator
from prophy.pretraining.vae import reconstruct
from prophy.sandbox import HELD_OUT_TRIPLES, SCENES, WORLD_M, Part, SimulatedClip, play_parts

NUM_CLIPS = 48
_TOGETHER = 4
QUARTERS = (1, 5, 9, 13, 17)  # frames, the first given
BODIES = {
    "bouncing_ball": "ball",
    "striking_ball": "striking_ball",
    "pendulum": "bob",
    "rolling_wheel": "wheel",
    "block_on_spring": "block",
    "jelly": "jelly",
}
"""By scene, the track of the body that has the colour."""

Clips = Sequence[SimulatedClip]
Make = Callable[[Clips, int], list[np.ndarray]]


def bodies(number: int) -> list[SimulatedClip]:
    """Clips of one coloured body alone, the scenes in turn."""
    scenes = [scene for scene in SCENES if scene.name in BODIES]
    clips = []
    for index in range(number):
        scene = scenes[index % len(scenes)]
        colour, side = sorted(HELD_OUT_TRIPLES[scene.phenomenon])[index // len(scenes) % 2]
        clips.append(
            play_parts(
                (Part(scene, colour, side),),
                np.random.default_rng((index, 7)),
                num_frames=SAMPLING.num_frames,
                fps=SAMPLING.fps,
                size=SAMPLING.size,
            )
        )
    return clips


def continued(pipeline: PhysicsPipeline, clips: Clips, seed: int) -> list[np.ndarray]:
    """A video of each clip's first frame and caption."""
    from_image = pipeline.for_images()
    from_image.set_progress_bar_config(disable=True)
    first = np.stack([clip.frames[0] for clip in clips])
    with autocast(pipeline.device, "bfloat16"):
        made = from_image(
            torch.from_numpy(first).permute(0, 3, 1, 2).float() / 255,
            [clip.caption for clip in clips],
            height=SAMPLING.size,
            width=SAMPLING.size,
            num_frames=SAMPLING.num_frames,
            num_inference_steps=SAMPLING.num_inference_steps,
            guidance_scale=SAMPLING.guidance_scale,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(len(clips))],
            output_type="np",
        ).frames
    return list((np.clip(made, 0, 1) * 255).round().astype(np.uint8))


def sources_of(num_clips: int) -> str:
    """Names all that decides videos: the weights, and the clips that they begin with."""
    made_of = [fingerprint("tiny", None), *simulator().values(), str(num_clips)]
    return hashlib.sha256(" ".join(made_of).encode()).hexdigest()[:12]


def kept(folder: Path, name: str, clips: Clips, make: Make) -> list[np.ndarray]:
    """The videos of clips, a few at a time; those that are in the folder are read."""
    videos: list[np.ndarray] = []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(clips), _TOGETHER):
        batch = clips[start : start + _TOGETHER]
        path = folder / f"{name}-{start:03d}-{len(batch)}.npy"
        if not path.exists():
            np.save(path.with_suffix(".partial.npy"), np.stack(make(batch, start)))
            path.with_suffix(".partial.npy").rename(path)
        videos += list(np.load(path))
    return videos


def overlaps(videos: Sequence[np.ndarray], clips: Clips) -> np.ndarray:
    """Intersection over union of what is drawn with the true clip, `[N, quarters]`."""
    found = []
    for video, clip in zip(videos, clips, strict=True):
        ours, theirs = drawn(video), drawn(clip.frames)
        found.append(
            [
                (ours[start:end] & theirs[start:end]).sum()
                / max((ours[start:end] | theirs[start:end]).sum(), 1)
                for start, end in pairwise(QUARTERS)
            ]
        )
    return np.array(found)


def distances(videos: Sequence[np.ndarray], clips: Clips) -> np.ndarray:
    """How far each clip's body is from its true place, in metres, `[N, T]`; NaN where none is seen."""
    found = []
    for video, clip in zip(videos, clips, strict=True):
        [part] = clip.parts
        [track] = [track for track in clip.tracks if track.name == BODIES[part.scene.name]]
        places, _ = follow(video, part.colour, part.side, SAMPLING.size / WORLD_M)
        found.append(np.linalg.norm(places - track.position_m, axis=1))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/first_frame"))
    parser.add_argument("num_clips", nargs="?", type=int, default=NUM_CLIPS)
    given = parser.parse_args()
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, None)
    folder = given.folder / sources_of(given.num_clips)

    def of_text(clips: Clips, seed: int) -> list[np.ndarray]:
        requests = [Request(clip.caption, clip.parts, seed + index) for index, clip in enumerate(clips)]
        return list(make_videos(pipeline, requests, SAMPLING))

    ways: dict[str, Make] = {
        "first frame repeated": lambda clips, _: [
            clip.frames[:1].repeat(SAMPLING.num_frames, 0) for clip in clips
        ],
        "first frame and caption": lambda clips, seed: continued(pipeline, clips, seed),
        "caption alone": of_text,
        "true clip through the VAE": lambda clips, _: list(
            reconstruct(pipeline.vae, (clip.frames for clip in clips))
        ),
    }
    sets = {"all": held_out_clips(given.num_clips), "bodies": bodies(given.num_clips)}
    videos = {
        (name, way): kept(folder / way.replace(" ", "_"), name, clips, make)
        for way, make in ways.items()
        for name, clips in sets.items()
    }
    console = Console(width=120)
    seconds = [f"to {(end - 1) / SAMPLING.fps:g} s" for end in QUARTERS[1:]]
    shapes = Table(
        "", *seconds, "all", "minus repeated", title=f"overlap of what is drawn, {given.num_clips} clips"
    )
    places = Table(
        "", *seconds, "all", "minus repeated", "seen", title=f"body is off by, m, {given.num_clips} clips"
    )
    for table, measure, name in ((shapes, overlaps, "all"), (places, _off, "bodies")):
        first = None
        for way in ways:
            values = measure(videos[name, way], sets[name])
            means = _mean(values)
            first = means if first is None else first
            both = np.isfinite(means) & np.isfinite(first)
            row = [_interval(estimate(column[np.isfinite(column)])) for column in (*values.T, means)]
            row.append(_interval(compare(means[both], first[both])))
            if table is places:
                seen = np.isfinite(distances(videos[name, way], sets[name])[:, 1:]).mean()
                row.append(f"{100 * seen:.0f} %")
            table.add_row(way, *row)
        console.print(table)


def _off(videos: Sequence[np.ndarray], clips: Clips) -> np.ndarray:
    """Means of `distances` over each quarter, `[N, quarters]`; NaN where no frame shows the body."""
    found = distances(videos, clips)
    quarters = [found[:, start:end] for start, end in pairwise(QUARTERS)]
    return np.stack([_mean(part) for part in quarters], 1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Means of the rows of `[N, M]` over what is finite; NaN where nothing is."""
    return np.ma.masked_invalid(values).mean(axis=1).filled(np.nan)


def _interval(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:.2f} ({value.low:.2f}, {value.high:.2f})"


if __name__ == "__main__":
    main()
