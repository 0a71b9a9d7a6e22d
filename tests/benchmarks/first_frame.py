"""Does a backbone go on from a first frame as the simulator does?

    python tests/benchmarks/first_frame.py FOLDER [NUM_CLIPS]

FOLDER is what `prophy pretrain backbone` filled: `pretrained` in its run_dir.

Clips with combinations that were never trained, each made anew of its first frame and caption, and falls,
whose ball is followed. Beside them what the VAE makes of the true clip (the ceiling), the first frame
repeated, and a video of the caption alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from rich.console import Console
from rich.table import Table

from prophy.backbones.loading import load_pipeline
from prophy.device import autocast
from prophy.evaluation.generated import Request, make_videos
from prophy.evaluation.motion import follow
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.pretraining.backbone import SAMPLING
from prophy.pretraining.recipe import held_out_clips
from prophy.pretraining.vae import reconstruct
from prophy.sandbox import COLOURS, SCENES, WORLD_M, Part, SimulatedClip, play_parts

NUM_CLIPS = 24
HEADER = ("", "clips", "error inside masks", "balls", "ball's height is off by, m")


def continued(pipeline: PhysicsPipeline, clips: Sequence[SimulatedClip]) -> list[np.ndarray]:
    """A video of each clip's first frame and caption, by the pipeline that Wan2.2-TI2V-5B has."""
    parts = {
        name: pipeline.components[name]
        for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    }
    from_image = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    from_image.set_progress_bar_config(disable=True)
    videos = []
    for index, clip in enumerate(clips):
        with autocast(pipeline.device, "bfloat16"):
            made = from_image(
                Image.fromarray(clip.frames[0]),
                clip.caption,
                height=SAMPLING.size,
                width=SAMPLING.size,
                num_frames=SAMPLING.num_frames,
                num_inference_steps=SAMPLING.num_inference_steps,
                guidance_scale=SAMPLING.guidance_scale,
                generator=torch.Generator().manual_seed(index),
                max_sequence_length=pipeline.config.max_sequence_length,
                output_type="np",
            ).frames[0]
        videos.append((np.clip(made, 0, 1) * 255).round().astype(np.uint8))
    return videos


def inside_masks(videos: Sequence[np.ndarray], clips: Sequence[SimulatedClip]) -> list[float]:
    """Mean absolute error of each clip where something happens, after the first frame, of 255."""
    errors = []
    for video, clip in zip(videos, clips, strict=True):
        mask = np.any(list(clip.masks.values()), axis=0)[1:]
        errors.append(float(np.abs(video[1:].astype(float) - clip.frames[1:])[mask].mean()))
    return errors


def heights_off(videos: Sequence[np.ndarray], clips: Sequence[SimulatedClip]) -> list[float]:
    """How far each clip's ball is from its true height, in metres, over the frames that show it."""
    off = []
    for video, clip in zip(videos, clips, strict=True):
        [part], [track] = clip.parts, clip.tracks
        heights, _ = follow(video, part.colour, part.side, SAMPLING.size / WORLD_M)
        off.append(float(np.nanmean(np.abs(heights - track.position_m[:, 1])[1:])))
    return off


def main() -> None:
    folder = Path(sys.argv[1])
    number = int(sys.argv[2]) if len(sys.argv) > 2 else NUM_CLIPS
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32).eval()
    pipeline = load_pipeline(
        "wan", str(folder / "pipeline"), None, torch.float32, None, transformer=transformer
    )
    clips = held_out_clips(number)
    [ball] = [scene for scene in SCENES if scene.name == "bouncing_ball"]
    falls = [
        play_parts(
            (Part(ball, list(COLOURS)[index % len(COLOURS)], ("left", "right")[index % 2]),),
            np.random.default_rng((index, 7)),
            num_frames=SAMPLING.num_frames,
            fps=SAMPLING.fps,
            size=SAMPLING.size,
        )
        for index in range(number)
    ]

    def of_text(clips: Sequence[SimulatedClip]) -> list[np.ndarray]:
        requests = [Request(clip.caption, clip.parts, index) for index, clip in enumerate(clips)]
        return list(make_videos(pipeline, requests, SAMPLING))

    def frozen(clips: Sequence[SimulatedClip]) -> list[np.ndarray]:
        return [clip.frames[:1].repeat(SAMPLING.num_frames, 0) for clip in clips]

    def ceiling(clips: Sequence[SimulatedClip]) -> list[np.ndarray]:
        return list(reconstruct(pipeline.vae, (clip.frames for clip in clips)))

    table = Table(*HEADER, title="the first frame and what follows: mean and its standard error")
    for name, make in {
        "made of first frame and caption": lambda clips: continued(pipeline, clips),
        "made of the caption alone": of_text,
        "the first frame, repeated": frozen,
        "the true clip through the VAE": ceiling,
    }.items():
        errors, off = inside_masks(make(clips), clips), heights_off(make(falls), falls)
        table.add_row(name, str(len(clips)), _mean(errors), str(np.isfinite(off).sum()), _mean(off, digits=2))
    Console(width=110).print(table)


def _mean(values: Sequence[float], digits: int = 1) -> str:
    found = np.array(values)[np.isfinite(values)]
    return f"{found.mean():.{digits}f} +- {found.std(ddof=1) / len(found) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    main()
