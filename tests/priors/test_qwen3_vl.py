"""Qwen3-VL, whose video has words between its slices, against stock transformers: its processor, eager."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.grounding import make_targets
from prophy.priors.qwen_vl import Qwen3VL
from prophy.priors.vlm import load_vlm
from prophy.tiny import bundled
from tests.wisa import WISA

FPS = 4.0
QUESTIONS = ["Describe this video in one sentence.", "Describe the collision in this video in one sentence."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large random weights, so that attention is peaked; and features from within the vision tower."""
    folder = tmp_path_factory.mktemp("qwen3-vl")
    tokenizer = AutoTokenizer.from_pretrained(bundled("vlm"))
    tokenizer.add_tokens([f"{digit}" for digit in range(10)] + ["<", ">", "seconds"])

    def token(text: str) -> int:
        number = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(number, int)
        return number

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data *= 4
    model.lm_head.weight.data[:8] = 0  # no special token is ever the likeliest
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Qwen3VL:
    vlm = load_vlm(str(folder), None, "float32", None)
    assert isinstance(vlm, Qwen3VL)
    return vlm


@torch.inference_mode()
def stock_attention(
    folder: Path, vlm: Qwen3VL, frames: np.ndarray, question: str, token_ids: tuple[int, ...]
) -> torch.Tensor:
    """One full forward over prompt and answer: mean over layers and heads, from the answer to the video."""
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    stock.set_attn_implementation("eager")
    patches, grid = vlm.pixels(frames)
    # What the stock processor puts in the place of the video's token; it lacks torchvision here to be made.
    processor = object.__new__(Qwen3VLProcessor)
    processor.video_token, processor.vision_start_token = "<|video_pad|>", "<|vision_start|>"
    processor.vision_end_token = "<|vision_end|>"
    processor.video_processor = type("Sizes", (), {"merge_size": 2, "temporal_patch_size": 2})
    metadata = type("Metadata", (), {"fps": FPS, "frames_indices": list(range(len(frames)))})
    video = processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
    assert video.count("seconds>") == 4 and video.startswith("<0.1 seconds><|vision_start|>")
    head, tail = vlm.split_prompt(question)
    ids = vlm.tokenizer(head + video + tail, add_special_tokens=False, return_tensors="pt").input_ids
    prompt_length = ids.shape[1]
    ids = torch.cat([ids, torch.tensor([token_ids])], 1)
    is_video = ids == vlm.model.config.video_token_id
    attentions = stock(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=is_video * 2,
        pixel_values_videos=patches,
        video_grid_thw=grid,
        use_cache=False,
        output_attentions=True,
    ).attentions
    return torch.stack(attentions)[:, 0, :, prompt_length:, is_video[0]].mean((0, 1)).mean(0)


def test_maps_equal_stock_runs(folder: Path, vlm: Qwen3VL, frames: np.ndarray) -> None:
    [prefix] = vlm.watch([frames], [FPS])
    assert prefix.grid == (4, 6, 8) and len(prefix.video) == 4 * 6 * 8
    assert prefix.video[-1] - prefix.video[0] > len(prefix.video)  # words stand between the slices
    assert prefix.slice_times == ((0.0, 0.25), (0.5, 0.75), (1.0, 1.25), (1.5, 1.75))
    [answers] = vlm.answer([prefix], [QUESTIONS], 5, range(vlm.num_layers))
    maps = torch.stack([answer.attention.flatten() for answer in answers])
    expected = torch.stack(
        [
            stock_attention(folder, vlm, frames, question, answer.token_ids)
            for question, answer in zip(QUESTIONS, answers, strict=True)
        ]
    )
    assert expected.amax(1).min() > 3 * expected.mean()  # peaked, so that the comparison means something
    assert (expected[0] - expected[1]).abs().sum() > 0.05
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-4)


def test_a_batch_says_and_looks_as_each_video_alone(vlm: Qwen3VL, frames: np.ndarray) -> None:
    """The words that say the time are of another number at another rate: each video has its own prefill."""
    videos, fps = [frames, frames[::-1].copy(), frames[:, :, :32]], [FPS, 0.1, FPS]
    prefixes = vlm.watch(videos, fps)
    assert len({prefix.length for prefix in prefixes}) == 3
    together = vlm.answer(prefixes, [QUESTIONS, QUESTIONS[:1], QUESTIONS[::-1]], 5, range(vlm.num_layers))
    for video, rate, answers in zip(videos, fps, together, strict=True):
        [alone] = vlm.answer(vlm.watch([video], [rate]), [QUESTIONS], 5, range(vlm.num_layers))
        by_tokens = {answer.token_ids: answer.attention for answer in alone}
        for answer in answers:
            expected = by_tokens[answer.token_ids]
            torch.testing.assert_close(answer.attention, expected, atol=1e-6, rtol=1e-4)


def test_its_priors_become_targets(folder: Path, frames: np.ndarray) -> None:
    extractor = PriorExtractor(str(folder), WISA, dtype="float32", max_new_tokens=4)
    [priors] = extractor([Clip(frames, FPS, ("collision",))])
    assert priors.maps.shape == (2, 4, 6, 8) and (priors.maps > 0).all()
    targets, mask = make_targets(
        torch.from_numpy(priors.maps),
        priors.map_phenomena,
        torch.zeros(4, 5, 6, 8),
        grid=(5, 6, 8),
        num_frames=17,
        slices=torch.tensor(priors.slice_times, dtype=torch.float64) / 1.75,
        num_phenomena=17,
        recipe="minus_background",
    )
    assert mask[:, 0].any() and not mask[:, 1:].any() and targets.max() == 1
