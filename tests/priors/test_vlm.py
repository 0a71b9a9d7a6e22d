"""Shared prefix, batch, padding and kept attention against stock transformers: separate runs, eager."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from prophy.errors import ProPhyError
from prophy.priors.questionnaire import questionnaire
from prophy.priors.qwen_vl import Qwen25VL
from prophy.priors.vlm import load_vlm
from prophy.tiny import bundled
from tests.object_store import object_store
from tests.wisa import WISA

FPS = 4.0
QUESTIONS = [question.text for question in questionnaire(WISA)[:6]]


@pytest.fixture(scope="module")
def vlm(peaked_vlm: Path, frames: np.ndarray) -> Qwen25VL:
    vlm = load_vlm(str(peaked_vlm), None, "float32", None)
    assert isinstance(vlm, Qwen25VL)
    [endless] = vlm.answer(vlm.watch([frames], [FPS]), [QUESTIONS], 12, [0])
    assert {len(answer.token_ids) for answer in endless} == {12}
    # Two tokens that the model is known to say end an answer, so that answers end at different steps.
    starts = {answer.token_ids[0] for answer in endless}
    ends = [next(token for token in endless[row].token_ids[4:] if token not in starts) for row in (0, 2)]
    vlm.end_tokens = frozenset(ends)
    return vlm


@pytest.fixture(scope="module")
def stock(peaked_vlm: Path) -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(peaked_vlm, dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model.eval()


def stock_inputs(vlm: Qwen25VL, frames: np.ndarray, question: str) -> dict[str, torch.Tensor]:
    """What the stock processor would make of one video and one question."""
    patches, grid = vlm.pixels(frames)
    head, tail = vlm.split_prompt(question)
    text = head + "<|video_pad|>" * (int(grid.prod()) // 4) + tail
    ids = vlm.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == vlm.model.config.video_token_id) * 2,
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([2 / FPS]),
    }


@torch.inference_mode()
def stock_attention(
    vlm: Qwen25VL,
    stock: Qwen2_5_VLForConditionalGeneration,
    frames: np.ndarray,
    question: str,
    token_ids: Sequence[int],
    layers: Sequence[int],
) -> torch.Tensor:
    """One full forward over prompt and answer: eager attention rows of the answer's tokens, `[V]`."""
    inputs = stock_inputs(vlm, frames, question)
    prompt_length = inputs["input_ids"].shape[1]
    answer = torch.tensor([token_ids], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
    attentions = stock(**inputs, use_cache=False, output_attentions=True).attentions
    video = inputs["input_ids"][0] == vlm.model.config.video_token_id
    rows = torch.stack([attentions[layer][0, :, prompt_length:] for layer in layers])
    return rows[..., video].mean((0, 1)).sum(0) / max(len(token_ids), 1)


def test_pixels_equal_the_stock_processor_frame_by_frame(vlm: Qwen25VL, frames: np.ndarray) -> None:
    """The stock image processor repeats its image over a temporal patch; here each frame has its own."""
    stock = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, do_resize=False)
    patches, grid = vlm.pixels(frames)
    assert grid.tolist() == [[4, 12, 16]]
    patches = patches.reshape(4, 12 * 16, 3, 2, 4, 4)
    for index, frame in enumerate(frames):
        image = stock(frame, return_tensors="pt")["pixel_values"].reshape(12 * 16, 3, 2, 4, 4)
        torch.testing.assert_close(patches[index // 2, :, :, index % 2], image[:, :, 0], atol=1e-6, rtol=0)


def test_maps_equal_separate_full_runs(
    vlm: Qwen25VL, stock: Qwen2_5_VLForConditionalGeneration, frames: np.ndarray
) -> None:
    [prefix] = vlm.watch([frames], [FPS])
    assert prefix.grid == (4, 6, 8)
    layers = range(vlm.num_layers)
    [answers] = vlm.answer([prefix], [QUESTIONS], 12, layers)
    assert len({len(answer.token_ids) for answer in answers}) > 1  # answers end at different steps
    maps = torch.stack([answer.attention for answer in answers]).flatten(1)
    expected = torch.stack(
        [
            stock_attention(vlm, stock, frames, question, answer.token_ids, layers)
            for question, answer in zip(QUESTIONS, answers, strict=True)
        ]
    )
    # Peaked, so that the comparison below means something.
    assert expected.amax(1).min() > 3 * expected.mean()
    assert torch.cdist(expected, expected, 1).fill_diagonal_(1).min() > 0.05  # and different per question
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-4)


def test_texts_equal_stock_generate(vlm: Qwen25VL, stock: Any, frames: np.ndarray) -> None:
    [answers] = vlm.answer(vlm.watch([frames], [FPS]), [QUESTIONS], 12, [0])
    assert len({answer.text for answer in answers}) > 2
    for question, answer in zip(QUESTIONS, answers, strict=True):
        inputs = stock_inputs(vlm, frames, question)
        generated = stock.generate(
            **inputs, do_sample=False, max_new_tokens=12, eos_token_id=[*vlm.end_tokens]
        )[0, inputs["input_ids"].shape[1] :].tolist()
        if generated[-1] in vlm.end_tokens:
            generated.pop()
        assert list(answer.token_ids) == generated
        assert answer.text == vlm.tokenizer.decode(generated, skip_special_tokens=True).strip()


def test_only_the_chosen_layers_are_kept(
    vlm: Qwen25VL, stock: Qwen2_5_VLForConditionalGeneration, frames: np.ndarray
) -> None:
    [prefix] = vlm.watch([frames], [FPS])
    for layers in ([2], [0, 3]):
        [[answer]] = vlm.answer([prefix], [QUESTIONS[:1]], 6, layers)
        expected = stock_attention(vlm, stock, frames, QUESTIONS[0], answer.token_ids, layers)
        torch.testing.assert_close(answer.attention.flatten(), expected, atol=1e-6, rtol=1e-4)


def test_a_batch_says_and_looks_as_each_video_alone(vlm: Qwen25VL, frames: np.ndarray) -> None:
    """Videos and questions of all lengths; the second and the third video are one prefill."""
    videos = [frames, frames[:, :, :32], frames[:, ::-1, 32:].copy(), frames[:4]]
    fps = [4.0, 4.0, 2.0, 4.0]
    asked = [QUESTIONS[:4], QUESTIONS[3:4], QUESTIONS[::-1], QUESTIONS[1:3]]
    together = vlm.answer(vlm.watch(videos, fps), asked, 12, [0, 2], [1, 3])
    for video, rate, questions, answers in zip(videos, fps, asked, together, strict=True):
        [alone] = vlm.answer(vlm.watch([video], [rate]), [questions], 12, [0, 2], [1, 3])
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        for one, other in zip(answers, alone, strict=True):
            torch.testing.assert_close(one.attention, other.attention, atol=1e-6, rtol=1e-4)


def test_a_prefix_is_left_as_it_was(vlm: Qwen25VL, frames: np.ndarray) -> None:
    [prefix] = vlm.watch([frames], [FPS])
    length = prefix.length
    [first] = vlm.answer([prefix], [QUESTIONS], 5, [1])
    [again] = vlm.answer([prefix], [QUESTIONS], 5, [1])
    assert prefix.length == length
    for one, other in zip(first, again, strict=True):
        assert one.token_ids == other.token_ids and torch.equal(one.attention, other.attention)


def test_an_empty_answer_has_an_empty_map(
    vlm: Qwen25VL, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "end_tokens", range(vlm.model.config.text_config.vocab_size))
    [[_, answer]] = vlm.answer(vlm.watch([frames], [FPS]), [QUESTIONS[:2]], 5, [1])
    assert answer.text == "" and answer.token_ids == () and not answer.attention.any()


@pytest.mark.parametrize("shape", [(7, 64, 64), (8, 60, 64), (8, 64, 63)])
def test_frames_that_do_not_divide(vlm: Qwen25VL, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ProPhyError, match=f"{shape[0]} frames of {shape[1]}x{shape[2]}.*multiple of 2.*multiples of 8"
    ):
        vlm.watch([np.zeros((*shape, 3), np.uint8)], [FPS])


def test_what_is_not_a_qwen(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="cannot load vlm.pretrained"):
        load_vlm(str(tmp_path / "nothing"), None, "float32", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProPhyError, match="cannot load vlm.pretrained"):
        load_vlm(str(tmp_path), None, "float32", None)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ProPhyError, match="model_type is bert; give one of: qwen2_5_vl, qwen3_vl"):
        load_vlm(str(tmp_path), None, "float32", None)


def test_a_tokenizer_without_chat_template(peaked_vlm: Path, tmp_path: Path) -> None:
    for file in peaked_vlm.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ProPhyError, match="chat template"):
        load_vlm(str(tmp_path), None, "float32", None)


def test_a_model_in_s3_is_the_one_that_it_is_in_a_folder() -> None:
    with object_store() as store:
        store.mkdir("vlms")
        store.put(f"{bundled('vlm')}/", "vlms/tiny/", recursive=True)
        there, here = (load_vlm(place, None, "float32", None) for place in ("s3://vlms/tiny", "tiny"))
        assert isinstance(there, Qwen25VL) and isinstance(here, Qwen25VL)
        for one, other in zip(there.model.parameters(), here.model.parameters(), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(ProPhyError, match="no whole model lies at s3://vlms/no"):
            load_vlm("s3://vlms/no", None, "float32", None)
