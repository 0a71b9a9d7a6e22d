import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prophy.pretraining.vlm import VlmRecipe, pack, pretrain_vlm, true_answers, vlm_frames
from prophy.priors.qwen_vl import Qwen25VL
from prophy.priors.vlm import load_vlm
from prophy.sandbox import SimulatedClip, simulate_clip
from tests.wisa import WISA

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread costs tensors as small as these more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips() -> list[SimulatedClip]:
    clips = [simulate_clip(seed, num_frames=17, fps=8.0, size=64) for seed in range(4)]
    return [min(clips, key=lambda clip: len(clip.parts)), max(clips, key=lambda clip: len(clip.parts))]


def test_a_packed_sequence_equals_separate_ones(clips: list[SimulatedClip]) -> None:
    vlm = load_vlm("tiny", None, "float32", None)
    assert isinstance(vlm, Qwen25VL)
    assert [len(clip.parts) for clip in clips] == [1, 2]  # so that one sequence is padded
    batch = pack(vlm, WISA, clips, np.random.default_rng(0))
    with torch.inference_mode():
        packed = vlm.model(**batch)
    learned = batch["labels"] != -100
    rng = np.random.default_rng(0)
    total, count = 0.0, 0
    for row, clip in enumerate(clips):
        separate = []
        patches, grid = vlm.pixels(vlm_frames(clip.frames))
        for question, answer in true_answers(WISA, clip, rng):
            head, tail = vlm.split_prompt(question.text)
            prompt = vlm.tokenizer(head + "<|video_pad|>" * 256 + tail, add_special_tokens=False).input_ids
            said = vlm.tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
            assert vlm.tokenizer.unk_token_id not in prompt + said
            ids = torch.tensor([prompt + said])
            with torch.inference_mode():
                out = vlm.model(
                    input_ids=ids,
                    mm_token_type_ids=(ids == vlm.model.config.video_token_id) * 2,
                    pixel_values_videos=patches,
                    video_grid_thw=grid,
                    second_per_grid_ts=torch.tensor([2 / 3.5]),
                    labels=torch.tensor([len(prompt) * [-100] + said]),
                )
            separate.append(out.logits[0, len(prompt) - 1 : -1])
            total, count = total + out.loss.item() * len(said), count + len(said)
        before = torch.roll(learned[row], -1)
        torch.testing.assert_close(packed.logits[row, before], torch.cat(separate), atol=1e-5, rtol=1e-4)
    assert packed.loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_goes_on_where_it_was_cut_off_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = VlmRecipe(num_steps=3, num_held_out=1, batch_size=1, warmup_steps=1, validate_every=2)
    whole = pretrain_vlm(tmp_path / "whole", recipe, WISA)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("prophy.pretraining.recipe._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr("prophy.pretraining.vlm._validate", _interrupt)
        pretrain_vlm(tmp_path / "cut", recipe, WISA)
    cut = pretrain_vlm(tmp_path / "cut", recipe, WISA)
    assert cut.history == whole.history
    assert whole.history[2]["validation"] < whole.history[1]["validation"]
    weights = [load_file(tmp_path / name / "vlm" / "model.safetensors") for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    measured = json.loads((tmp_path / "whole" / "vlm.json").read_text())
    assert {"presence", "phenomena", "captions", "descriptions"} <= measured.keys()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
