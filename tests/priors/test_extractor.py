import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prophy.errors import ProPhyError
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.fingerprint import priors_fingerprint
from prophy.priors.questionnaire import BACKGROUND, CAPTION, ask_presence, describe_named
from prophy.priors.qwen_vl import Qwen25VL
from prophy.priors.vlm import load_vlm
from tests.wisa import WISA

FPS = 4.0
PRESENT = ("collision", "combustion")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, peaked_vlm: Path, frames: np.ndarray) -> Path:
    """A VLM that knows three answers about one clip: phenomena and a word that is none, caption, background.

    Its output layer is the least-squares solution of "say the answer's next token" at each of their tokens.
    """
    vlm = load_vlm(str(peaked_vlm), None, "float32", None)
    assert isinstance(vlm, Qwen25VL)
    patches, grid = vlm.pixels(frames)
    states, tokens = [], []
    for question, answer in [
        (ask_presence(WISA), "combustion; collision; video"),
        (CAPTION, "collision"),
        (BACKGROUND, "none"),
    ]:
        head, tail = vlm.split_prompt(question.text)
        prompt = vlm.tokenizer(head + "<|video_pad|>" * 192 + tail, add_special_tokens=False).input_ids
        said = vlm.tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + said])
        with torch.inference_mode():
            hidden = vlm.model.model(
                input_ids=ids,
                mm_token_type_ids=(ids == vlm.model.config.video_token_id) * 2,
                pixel_values_videos=patches,
                video_grid_thw=grid,
                second_per_grid_ts=torch.tensor([2 / FPS]),
            ).last_hidden_state
        states.append(hidden[0, len(prompt) - 1 : -1])
        tokens += said
    logits = torch.eye(vlm.model.config.text_config.vocab_size)[tokens]
    vlm.model.lm_head.weight.data = (torch.linalg.pinv(torch.cat(states)) @ logits).T.contiguous()
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(peaked_vlm, folder, dirs_exist_ok=True)
    vlm.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extractor(taught: Path) -> PriorExtractor:
    return PriorExtractor(str(taught), WISA, dtype="float32", max_new_tokens=8)


def test_the_vlm_names_the_phenomena(extractor: PriorExtractor, frames: np.ndarray) -> None:
    [priors] = extractor([Clip(frames, FPS)])
    assert priors.answers["presence"] == "combustion ; collision ; video"
    assert priors.phenomena == PRESENT
    assert priors.unparsed == ("video",)
    assert priors.map_phenomena == [0, 10]
    assert priors.vlm_caption == priors.answers["caption"] == "collision"
    assert list(priors.answers) == ["caption", "presence", "background", "collision", "combustion"]
    assert priors.maps.shape == (3, 4, 6, 8) and priors.maps.dtype == np.float32
    assert (priors.maps > 0).all() and (priors.maps.sum((1, 2, 3)) < 1).all()


def test_given_labels_are_taken_and_not_asked_for(extractor: PriorExtractor, frames: np.ndarray) -> None:
    [named], [given] = extractor([Clip(frames, FPS)]), extractor([Clip(frames, FPS, PRESENT)])
    assert list(given.answers) == ["caption", "background", "collision", "combustion"]
    assert given.phenomena == PRESENT and given.unparsed == ()
    np.testing.assert_allclose(given.maps, named.maps, atol=1e-6)  # batched otherwise
    [none] = extractor([Clip(frames, FPS, ())])
    assert none.phenomena == () and none.map_phenomena == []
    np.testing.assert_allclose(none.maps, named.maps[-1:], atol=1e-6)


def test_clips_of_a_batch_get_the_priors_that_they_get_alone(
    extractor: PriorExtractor, frames: np.ndarray
) -> None:
    clips = [
        Clip(frames, FPS),
        Clip(frames[:, :, :32], FPS, ("collision", "combustion", "melting")),
        Clip(frames[:, :, ::-1].copy(), FPS),
        Clip(frames[::-1].copy(), 2.0, ()),
    ]
    for clip, priors in zip(clips, extractor(clips), strict=True):
        [alone] = extractor([clip])
        assert (priors.answers, priors.phenomena, priors.unparsed) == (
            alone.answers,
            alone.phenomena,
            alone.unparsed,
        )
        assert (priors.map_phenomena, priors.slice_times) == (alone.map_phenomena, alone.slice_times)
        np.testing.assert_allclose(priors.maps, alone.maps, atol=1e-6)


def test_each_map_belongs_to_its_question(extractor: PriorExtractor, frames: np.ndarray) -> None:
    [priors] = extractor([Clip(frames, FPS, PRESENT)])
    for question, row in zip([*describe_named(WISA, PRESENT), BACKGROUND], priors.maps, strict=True):
        video = extractor.vlm.watch([frames], [FPS])
        [[alone]] = extractor.vlm.answer(video, [[question.text]], 8, range(4))
        np.testing.assert_allclose(row, alone.attention, atol=1e-6)
        assert priors.answers[question.id] == alone.text


@pytest.mark.parametrize("layers", [[4], [], [0, 7]])
def test_layers_that_do_not_exist(taught: Path, layers: list[int]) -> None:
    with pytest.raises(ProPhyError, match=r"vlm.layers .* 0 to 3"):
        PriorExtractor(str(taught), WISA, layers=layers)


@pytest.mark.parametrize("heads", [[4], []])
def test_heads_that_do_not_exist(taught: Path, heads: list[int]) -> None:
    with pytest.raises(ProPhyError, match=r"vlm.heads .* 0 to 3"):
        PriorExtractor(str(taught), WISA, heads=heads)


def test_chosen_heads_add_up_to_all_of_them(
    taught: Path, extractor: PriorExtractor, frames: np.ndarray
) -> None:
    clip = Clip(frames, FPS, PRESENT)
    by_head = [
        PriorExtractor(str(taught), WISA, dtype="float32", max_new_tokens=8, heads=[head])([clip])[0].maps
        for head in range(4)
    ]
    np.testing.assert_allclose(np.mean(by_head, 0), extractor([clip])[0].maps, atol=1e-6)
    assert max(np.abs(maps - by_head[0]).max() for maps in by_head[1:]) > 1e-4


def test_the_fingerprint_names_everything_that_priors_depend_on() -> None:
    base: dict[str, Any] = {
        "taxonomy": WISA,
        "model": "a",
        "dtype": "float32",
        "layers": [1, 2],
        "heads": None,
        "max_new_tokens": 8,
        "num_frames": 8,
        "shapes": [[64, 32]],
        "video_frames": 1,
    }
    changed = {
        "taxonomy": WISA.model_copy(update={"phenomena": WISA.phenomena[::-1]}),
        "model": "b",
        "dtype": "bfloat16",
        "layers": None,
        "heads": [0],
        "max_new_tokens": 9,
        "num_frames": 16,
        "shapes": [[64, 32], [32, 64]],
        "video_frames": 2,
    }
    prints = [priors_fingerprint(**base), *(priors_fingerprint(**base | {key: changed[key]}) for key in base)]
    assert len(set(prints)) == 1 + len(base)
    assert priors_fingerprint(**base) == prints[0]
