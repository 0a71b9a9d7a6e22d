"""Clips on disk: mp4 files, and a Parquet manifest that holds everything true of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prophy.errors import ProPhyError
from prophy.sandbox.clip import FEWEST_FRAMES, SCENES, ClipTruth, SimulatedClip, Track, simulate_clip
from prophy.sandbox.phenomena import Phenomenon
from prophy.sandbox.scene import Part, describe
from prophy.sandbox.splits import Split
from prophy.schema import MANIFEST
from prophy.video import read_frames, write_video

_COLUMNS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # relative to the manifest
        pa.field("caption", pa.string(), nullable=False),
        pa.field("phenomena", pa.list_(pa.string()), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("size", pa.int32(), nullable=False),
        pa.field("pixels_per_m", pa.float64(), nullable=False),
        pa.field(
            "parts", pa.list_(pa.struct({"scene": pa.string(), "colour": pa.string(), "side": pa.string()}))
        ),
        # The bits of [T, H, W] for each phenomenon.
        pa.field("masks", pa.list_(pa.binary()), nullable=False),
        # x and y in every frame, for each body.
        pa.field("tracks", pa.map_(pa.string(), pa.list_(pa.float64())), nullable=False),
        pa.field("constants", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)

_SEEDS_PER_DATASET = 1_000_000


@dataclass(frozen=True, kw_only=True)
class StoredClip(ClipTruth):
    """A clip on disk.

    Attributes:
        path: its video.
    """

    path: Path

    @property
    def frames(self) -> np.ndarray:
        """The video's frames as they were written, uint8 `[T, H, W, 3]`."""
        num_frames, height, width = next(iter(self.masks.values())).shape
        return read_frames(self.path, 0.0, (num_frames - 1) / self.fps, num_frames, height, width)


def write_dataset(
    folder: Path, *, num_clips: int, seed: int, num_frames: int, fps: float, size: int, split: Split = "train"
) -> Path:
    """Simulates clips and writes them as `clips/*.mp4` and `manifest.parquet`, the manifest last.

    Clips that the folder's manifest holds already stay as they are, and the rest are added.

    Args:
        folder: where; made if it is not there.
        num_clips: how many in all, at most a million.
        seed: the data set's; no two data sets share a clip's seed.
        num_frames: frames of each clip.
        fps: frame rate.
        size: height and width in pixels, even.
        split: as in `simulate_clip`.

    Returns:
        The path of the manifest.

    Raises:
        ProPhyError: the manifest holds other clips than these, or more of them, or clips are of one frame.
        OSError: the folder cannot be written to.
    """
    held = held_clips(
        folder, num_clips=num_clips, seed=seed, num_frames=num_frames, fps=fps, size=size, split=split
    )
    manifest = folder / MANIFEST
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, clip_seed in list(enumerate(_seeds(seed, num_clips)))[len(held) :]:
        clip = simulate_clip(clip_seed, num_frames=num_frames, fps=fps, size=size, split=split)
        path = f"clips/{index:06d}.mp4"
        write_video(folder / path, clip.frames, fps)
        rows.append(_row(clip) | {"path": path, "seed": clip_seed, "split": split})
    if rows:
        partial = manifest.with_name(f"{MANIFEST}.partial")
        table = pa.concat_tables([held, pa.Table.from_pylist(rows, _COLUMNS)])
        pq.write_table(table, partial, row_group_size=256)
        partial.replace(manifest)
    return manifest


def held_clips(
    folder: Path, *, num_clips: int, seed: int, num_frames: int, fps: float, size: int, split: Split = "train"
) -> pa.Table:
    """The rows of the folder's manifest, none if there is none: the first clips of those that are asked for.

    The arguments and the errors are those of `write_dataset`.
    """
    if num_frames < FEWEST_FRAMES:
        raise ProPhyError(
            f"simulate.num_frames is {num_frames}, and in one frame nothing happens; set it to "
            f"{FEWEST_FRAMES} or more"
        )
    manifest, seeds = folder / MANIFEST, _seeds(seed, num_clips)
    if not manifest.exists():
        return _COLUMNS.empty_table()
    try:
        held = pq.read_table(manifest)
    except pa.ArrowException:
        held = None
    if held is None or held.schema != _COLUMNS:
        raise ProPhyError(f"{manifest} is no list of simulated clips; choose another folder")
    for name, value in {"num_frames": num_frames, "fps": fps, "size": size, "split": split}.items():
        if others := set(held[name].to_pylist()) - {value}:
            raise ProPhyError(
                f"{manifest} holds clips with {name} {others.pop()}, not {value}; set it back, or choose "
                f"another folder"
            )
    before = held["seed"].to_pylist()
    if before[:num_clips] != seeds[: len(before)]:
        raise ProPhyError(f"{manifest} holds clips of another seed; set it back, or choose another folder")
    if len(before) > num_clips:
        raise ProPhyError(
            f"{manifest} holds {len(before)} clips, more than the {num_clips} that are asked for; choose "
            f"another folder"
        )
    return held


def _seeds(seed: int, num_clips: int) -> list[int]:
    return [seed * _SEEDS_PER_DATASET + index for index in range(num_clips)]


def read_truth(manifest: Path) -> list[StoredClip]:
    """What is true of each clip of a data set, in the order of writing; frames are read when asked for."""
    return [_stored_clip(row, manifest.parent) for row in pq.read_table(manifest).to_pylist()]


def _row(clip: SimulatedClip) -> dict[str, Any]:
    num_frames, size, _, _ = clip.frames.shape
    return {
        "caption": clip.caption,
        "phenomena": [str(phenomenon) for phenomenon in clip.phenomena],
        "fps": clip.fps,
        "num_frames": num_frames,
        "size": size,
        "pixels_per_m": clip.pixels_per_m,
        "parts": [{"scene": p.scene.name, "colour": p.colour, "side": p.side} for p in clip.parts],
        "masks": [np.packbits(clip.masks[phenomenon]).tobytes() for phenomenon in clip.phenomena],
        "tracks": [(track.name, track.position_m.ravel().tolist()) for track in clip.tracks],
        "constants": list(clip.constants.items()),
    }


def _stored_clip(row: dict[str, Any], folder: Path) -> StoredClip:
    scenes = {scene.name: scene for scene in SCENES}
    parts = tuple(Part(scenes[p["scene"]], p["colour"], p["side"]) for p in row["parts"])
    shape = (row["num_frames"], row["size"], row["size"])
    phenomena = tuple(map(Phenomenon, row["phenomena"]))
    bits = [np.unpackbits(np.frombuffer(mask, np.uint8), count=np.prod(shape)) for mask in row["masks"]]
    return StoredClip(
        path=folder / row["path"],
        fps=row["fps"],
        parts=parts,
        caption=row["caption"],
        captions=describe(parts),
        phenomena=phenomena,
        masks={p: mask.astype(bool).reshape(shape) for p, mask in zip(phenomena, bits, strict=True)},
        tracks=tuple(Track(name, np.reshape(position, (-1, 2))) for name, position in row["tracks"]),
        constants=dict(row["constants"]),
        pixels_per_m=row["pixels_per_m"],
    )
