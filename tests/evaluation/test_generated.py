from typing import Any

import numpy as np
import pytest
import torch

from prophy.backbones.loading import load_pipeline
from prophy.evaluation.generated import (
    Sampling,
    fall_requests,
    held_out_requests,
    judge_videos,
    make_videos,
    measure_falls,
)
from prophy.sandbox import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, play_parts
from prophy.sandbox.scene import GRAVITY_M_S2
from prophy.sandbox.splits import split_of

SAMPLING = Sampling(num_frames=17, fps=8.0, size=64, num_inference_steps=2, guidance_scale=2.0)


def test_every_combination_that_was_held_out_is_asked_for() -> None:
    requests = held_out_requests(wordings=2)
    assert all(split_of(request.parts) == "held_out" for request in requests)
    alone = {
        (p.phenomenon, p.colour, p.side)
        for request in requests
        if len(request.parts) == 1
        for p in request.parts
    }
    assert alone == {(p, *place) for p, places in HELD_OUT_TRIPLES.items() for place in places}
    together = {
        frozenset(p.phenomenon for p in request.parts) for request in requests if len(request.parts) == 2
    }
    assert together == HELD_OUT_PAIRS
    assert len({request.seed for request in requests}) == len(requests) == len({r.prompt for r in requests})
    assert requests == held_out_requests(wordings=2)


@pytest.mark.heavy
def test_true_clips_score_as_true() -> None:
    requests = held_out_requests(wordings=1)[::9]
    shape: dict[str, Any] = {"num_frames": 17, "fps": 8.0, "size": 64}
    rng = np.random.default_rng(0)
    verdicts = judge_videos([play_parts(r.parts, rng, **shape).frames for r in requests], requests, SAMPLING)
    assert all(part.phenomenon for video in verdicts for part in video)
    falls = fall_requests(8)
    videos = [play_parts(request.parts, rng, **shape).frames for request in falls]
    assert all(fall.obeys(GRAVITY_M_S2, 0.05) for fall in measure_falls(videos, falls, SAMPLING, 6.4))


@pytest.mark.heavy
def test_a_video_does_not_depend_on_those_made_beside_it() -> None:
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, None)
    requests = fall_requests(6)
    videos = list(make_videos(pipeline, requests, SAMPLING))
    assert [video.shape for video in videos] == 6 * [(17, 64, 64, 3)]
    [alone] = make_videos(pipeline, requests[4:5], SAMPLING)
    assert np.abs(alone.astype(int) - videos[4]).mean() < 2
    assert np.abs(videos[3].astype(int) - videos[4]).mean() > 5
