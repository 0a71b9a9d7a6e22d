"""Questions to the embedded backbone: the same noise for all, and an answer that batches do not change."""

from dataclasses import replace

import pytest
import torch

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.evaluation.denoising import Denoiser, Question, bare_branch, noise_like
from prophy.models.control import PhysicsControl
from prophy.sandbox import simulate_clip
from prophy.tiny import bundled

GRID = (5, 8, 8)


@pytest.fixture(scope="module")
def clips() -> list[Question]:
    encoder = VideoEncoder("tiny", None, "float32", None, 32, "wan")
    shown = [simulate_clip(seed, num_frames=17, fps=8.0, size=64, split="held_out") for seed in range(3)]
    text = encoder.encode_text([clip.caption for clip in shown])
    return [
        Question(
            encoder.encode_video(clip.frames[None])[0],
            {name: value[index] for name, value in text.items()},
            0.9,
            clip.caption,
        )
        for index, clip in enumerate(shown)
    ]


def denoiser(scale: float | None, batch_size: int = 8) -> Denoiser:
    """The embedded model with its branch at a scale, or without a branch."""
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = load_pipeline(
        "wan", "tiny", None, torch.float32, None if scale is None else bundled("branch"), **parts
    )
    classes, transformer = FAMILIES["wan"].classes(), pipeline.transformer
    if scale is None:
        transformer = classes.prophy_transformer.from_transformer(
            transformer, bare_branch(["x"], [5, 16, 16])
        )
    objective = classes.objective.from_scheduler(pipeline.scheduler.config)
    return Denoiser(transformer.eval(), objective, PhysicsControl(scale=scale or 0.0), None, batch_size)


def test_a_batch_answers_as_each_alone(clips: list[Question]) -> None:
    questions = [*clips, *(replace(clip, level=0.6) for clip in clips)]
    together = [answer.error for answer in denoiser(1.0).answer(questions, GRID)]
    alone = [answer.error for answer in denoiser(1.0, batch_size=1).answer(questions, GRID)]
    assert len(together) == 6
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.shape == GRID
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_branch_that_is_off_is_no_branch(clips: list[Question]) -> None:
    off, without = (list(denoiser(scale).answer(clips, GRID)) for scale in (0.0, None))
    on = list(denoiser(1.0).answer(clips, GRID))
    for index in range(len(clips)):
        assert torch.equal(off[index].error, without[index].error)
        assert not torch.equal(off[index].error, on[index].error)
        assert off[index].routing is None and without[index].routing is None
        routing = on[index].routing
        assert routing is not None and routing.phenomenon_maps is not None
        assert routing.phenomenon_maps.shape[:2] == (1, 5 * 8 * 8)


def test_the_right_caption_of_one_thing_is_preferred(clips: list[Question]) -> None:
    single = clips[0]
    other = replace(single, text=clips[1].text)
    right, wrong = denoiser(0.0).answer([single, other], GRID)
    assert right.error.mean() < wrong.error.mean()


def test_noise_is_the_same_for_a_name_and_another_for_another() -> None:
    latents = torch.zeros(16, 5, 8, 8)
    assert torch.equal(noise_like(latents, "a"), noise_like(latents, "a"))
    assert not torch.equal(noise_like(latents, "a"), noise_like(latents, "b"))
    assert noise_like(latents, "a").std() == pytest.approx(1.0, abs=0.05)
