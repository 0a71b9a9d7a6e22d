"""What training the embedded default's parts has in common: clips to learn from, a loop that can be cut off.

It does not know what is trained.
"""

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from prophy import sandbox
from prophy.errors import ProPhyError
from prophy.hashing import files_sha256, sources_sha256
from prophy.sandbox import SCENES, Part, SimulatedClip, simulate_clip

logger = logging.getLogger(__name__)

NUM_FRAMES, FPS, SIZE = 17, 8.0, 64
"""What the embedded default makes: frames, frames per second, height and width in pixels."""

MADE_FROM = "made_from.json"
"""In a folder of what can be made again: digests of what it was made from."""

_FIRST_HELD_OUT_SEED = 10**9
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SECONDS_BETWEEN_LINES = 20.0


@dataclass(frozen=True)
class TrainingClips:
    """Simulated clips, memory-mapped.

    Attributes:
        frames: RGB, uint8 `[N, T, H, W, 3]`.
        masks: where anything happens, bool `[N, T, H, W]`.
        parts: what each clip shows.
    """

    frames: np.ndarray
    masks: np.ndarray
    parts: list[tuple[Part, ...]]


def simulator() -> dict[str, str]:
    """The digest of what makes clips, by what it is called."""
    return {"sandbox": sources_sha256(Path(sandbox.__file__).parent)}


def folder_sha256(folder: Path) -> str:
    """One SHA-256, in hexadecimal, of the names and the content of all files in a folder."""
    return files_sha256(folder, folder.rglob("*"))


def made_from(folder: Path, sources: Mapping[str, object]) -> None:
    """Removes the files of a folder that were made from something else, and notes what they are made from."""
    note, said = folder / MADE_FROM, json.dumps(sources)
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text() == said:
        return
    for file in folder.iterdir():
        logger.info("%s was made from something else, and is made again", file)
        file.unlink()
    note.write_text(said)


def training_clips(folder: Path, num_clips: int, seed: int) -> TrainingClips:
    """The clips of the train split in `folder`; simulated on first use, and where the sandbox changed."""
    made_from(folder, {**simulator(), "clips": num_clips, "seed": seed})
    paths = {name: folder / f"{name}.npy" for name in ("frames", "masks")}
    parts_path = folder / "parts.json"
    if not parts_path.exists():
        shape = (num_clips, NUM_FRAMES, SIZE, SIZE)
        frames = np.lib.format.open_memmap(paths["frames"], "w+", np.uint8, (*shape, 3))
        masks = np.lib.format.open_memmap(paths["masks"], "w+", np.bool_, shape)
        shown = []
        for index in range(num_clips):
            clip = simulate_clip(seed * num_clips + index, num_frames=NUM_FRAMES, fps=FPS, size=SIZE)
            frames[index], masks[index] = clip.frames, np.any(list(clip.masks.values()), axis=0)
            shown.append([(part.scene.name, part.colour, part.side) for part in clip.parts])
        frames.flush()
        masks.flush()
        parts_path.write_text(json.dumps(shown))
        logger.info("simulated %d clips", num_clips)
    scenes = {scene.name: scene for scene in SCENES}
    parts = [
        tuple(Part(scenes[name], colour, side) for name, colour, side in clip)
        for clip in json.loads(parts_path.read_text())
    ]
    return TrainingClips(
        np.load(paths["frames"], mmap_mode="r"), np.load(paths["masks"], mmap_mode="r"), parts
    )


def held_out_clips(num_clips: int) -> list[SimulatedClip]:
    """Clips that hold a combination which no training clip holds."""
    return [
        simulate_clip(
            _FIRST_HELD_OUT_SEED + index, num_frames=NUM_FRAMES, fps=FPS, size=SIZE, split="held_out"
        )
        for index in range(num_clips)
    ]


class Stateful(Protocol):
    """A network, an optimiser, a moving average."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that a restart needs."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Takes it back."""


@dataclass
class Progress:
    """How far a training run is.

    Attributes:
        num_steps: steps in all, which its learning rates depend on.
        seconds: wall-clock time of all its steps.
        cpu_seconds: CPU time of this process in all its steps, over all cores.
        history: what each step measured.
    """

    num_steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    take_step: Callable[[int], dict[str, float]],
    state: Mapping[str, Stateful],
    checkpoint: Path,
    num_steps: int,
    sources: Mapping[str, str],
) -> Progress:
    """Takes steps 0 to `num_steps` - 1, or those that are left after the checkpoint.

    Args:
        take_step: takes step number n, on which alone its random draws depend, and returns what it measured.
        state: what changes in a step.
        checkpoint: file that is replaced about once a minute and at the end.
        num_steps: steps in all.
        sources: digests of what is learned from, by what it is called.

    Raises:
        ProPhyError: the checkpoint learned from something else.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # `taskset` keeps it to some cores
    progress = Progress(num_steps)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        before = saved.pop("sources", {})
        for name, digest in sources.items():
            if before.get(name) != digest:
                raise ProPhyError(
                    f"{checkpoint} was trained with another {name} than there is now; choose another run_dir "
                    "or remove this file, to train anew"
                )
        progress = Progress(**{"num_steps": num_steps} | saved.pop("progress"))
        if progress.num_steps != num_steps:
            logger.warning(
                "this run was to take %d steps and is to take %d: its learning rate, which falls to 0 over "
                "the last of them, jumps at step %d",
                progress.num_steps,
                num_steps,
                len(progress.history),
            )
            progress.num_steps = num_steps
        for name, part in state.items():
            part.load_state_dict(saved[name])
        logger.info("going on from step %d", len(progress.history))
    saved_at = printed_at = time.monotonic()
    while (step := len(progress.history)) < num_steps:
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        progress.history.append(take_step(step))
        progress.seconds += time.perf_counter() - seconds
        progress.cpu_seconds += time.process_time() - cpu_seconds
        done = step + 1 == num_steps
        if done or time.monotonic() > printed_at + _SECONDS_BETWEEN_LINES:
            printed_at = time.monotonic()
            means = _means(progress.history[-50:])
            logger.info("step %d of %d, %.0f s: %s", step + 1, num_steps, progress.seconds, means)
        if done or time.monotonic() > saved_at + _SECONDS_BETWEEN_CHECKPOINTS:
            saved_at = time.monotonic()
            states = {name: part.state_dict() for name, part in state.items()}
            _save(checkpoint, {"sources": dict(sources), **states}, progress)
    return progress


def _means(history: list[dict[str, float]]) -> str:
    values: dict[str, list[float]] = defaultdict(list)
    for entry in history:
        for name, value in entry.items():
            values[name].append(value)
    return ", ".join(f"{name} {np.mean(measured):.4g}" for name, measured in values.items())


def _save(checkpoint: Path, states: dict[str, Any], progress: Progress) -> None:
    draft = checkpoint.with_suffix(".tmp")
    torch.save({"progress": vars(progress), **states}, draft)
    draft.replace(checkpoint)


def trapezoid(step: int, num_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Factor of the learning rate: up in the warm-up, flat, down to zero in the last share of the steps."""
    return min(1.0, (step + 1) / warmup_steps, (1 - step / num_steps) / decay_share)


def set_learning_rate(optimisers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Sets it in all groups of all optimisers."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate


def round_to_bfloat16(network: torch.nn.Module) -> None:
    """Rounds every parameter to what will be stored, so that what is measured is what is shipped."""
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
