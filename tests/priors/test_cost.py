"""The count of a VLM's operations against a counter on the real thing, and that of a published one."""

from pathlib import Path

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prophy.priors.cost import NUM_PHENOMENA, published_or_loaded, vlm_cost
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.questionnaire import BACKGROUND, CAPTION, ask_presence, describe_named
from prophy.priors.qwen_vl import Qwen25VL
from prophy.tiny import EMBEDDED
from tests.wisa import WISA


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_operations_are_those_of_an_extraction(
    peaked_vlm: Path, frames: np.ndarray, layers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a token each, which need no step of their own: all is watched, asked and looked at."""
    monkeypatch.setattr("prophy.priors.cost._CHAT_TOKENS", 4)  # of the embedded tokenizer
    extractor = PriorExtractor(str(peaked_vlm), WISA, dtype="float32", layers=layers, max_new_tokens=1)
    named = describe_named(WISA, WISA.names[:NUM_PHENOMENA])
    [video] = extractor.vlm.watch([frames], [4.0])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        extractor.vlm.watch([frames], [4.0])
        for questions in ([CAPTION, ask_presence(WISA), BACKGROUND], named):
            extractor._ask([video], [questions])
    found = vlm_cost(
        published_or_loaded(str(peaked_vlm), None),
        "float32",
        WISA,
        frames.shape[:3],
        None if layers is None else 2,
        max_new_tokens=1,
    )
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found.num_tokens == len(video.video)


def test_of_a_published_model_without_network() -> None:
    settings = published_or_loaded("Qwen/Qwen2.5-VL-32B-Instruct", None)
    cost = vlm_cost(settings, "bfloat16", WISA, (16, 308, 532), None, 128)
    assert cost.num_parameters == pytest.approx(33.45e9, rel=0.001)
    assert cost.num_tokens == 8 * 11 * 19
    # Two operations per parameter and token of the video, and as much again for some 900 others.
    assert 1.0 < cost.flops / (2 * 31e9 * (cost.num_tokens + 900)) < 1.3
    # The weights are read for all clips of a batch at once.
    one, four = (cost.seconds(batch_size, 300e12, 2e12) for batch_size in (1, 4))
    assert one - four == pytest.approx(0.75 * 2 * 128 * cost.step_bytes / 2e12)


def test_layers_that_are_kept_cost_their_scores(peaked_vlm: Path) -> None:
    settings = published_or_loaded(str(peaked_vlm), None)
    none, two = (vlm_cost(settings, "float32", WISA, (8, 48, 64), kept, 4) for kept in (0, 2))
    assert two.flops > none.flops and two.step_bytes == none.step_bytes


def test_the_priors_of_the_embedded_vlm(frames: np.ndarray) -> None:
    """With its own shapes, and one vocabulary for what is read and what is said."""
    extractor = PriorExtractor(EMBEDDED, WISA, dtype="float32")
    assert isinstance(extractor.vlm, Qwen25VL)
    cost = vlm_cost(published_or_loaded(EMBEDDED, None), "float32", WISA, frames.shape[:3], None, 32)
    assert cost.num_parameters == sum(parameter.numel() for parameter in extractor.vlm.model.parameters())
    [priors] = extractor([Clip(frames, 4.0)])
    assert priors.maps[0].size == cost.num_tokens
