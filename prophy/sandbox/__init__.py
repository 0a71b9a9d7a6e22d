"""Simulated physics: clips with exact captions, masks, tracks and constants. Training data, and a ruler."""

from prophy.sandbox.clip import (
    FEWEST_FRAMES,
    SCENES,
    ClipTruth,
    SimulatedClip,
    Track,
    draw_parts,
    play_parts,
    simulate_clip,
    vocabulary,
)
from prophy.sandbox.combinations import held_out_combinations
from prophy.sandbox.contact_sheet import contact_sheet
from prophy.sandbox.dataset import StoredClip, held_clips, read_truth, write_dataset
from prophy.sandbox.drawing import BACKGROUND, COLOURS, FLOOR_M, WORLD_M
from prophy.sandbox.laws import WHEN_BROKEN, Law
from prophy.sandbox.phenomena import PHENOMENA, Phenomenon, check_taxonomy
from prophy.sandbox.scene import SIDES, Part, Scene, describe
from prophy.sandbox.splits import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, Split

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "FEWEST_FRAMES",
    "FLOOR_M",
    "HELD_OUT_PAIRS",
    "HELD_OUT_TRIPLES",
    "PHENOMENA",
    "SCENES",
    "SIDES",
    "WHEN_BROKEN",
    "WORLD_M",
    "ClipTruth",
    "Law",
    "Part",
    "Phenomenon",
    "Scene",
    "SimulatedClip",
    "Split",
    "StoredClip",
    "Track",
    "check_taxonomy",
    "contact_sheet",
    "describe",
    "draw_parts",
    "held_clips",
    "held_out_combinations",
    "play_parts",
    "read_truth",
    "simulate_clip",
    "vocabulary",
    "write_dataset",
]
