from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from prophy.tiny import bundled


@pytest.fixture(scope="session")
def peaked_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded VLM with large random weights, so that attention is peaked; pairs of heads share keys."""
    folder = tmp_path_factory.mktemp("peaked-vlm")
    config = AutoConfig.from_pretrained(bundled("vlm"))
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    config.text_config.rope_parameters["mrope_section"] = [6, 9, 9]
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.15
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.lm_head.weight.data[:8] = 0  # no special token is ever the likeliest
    model.generation_config.eos_token_id = [config.text_config.eos_token_id]
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    for part in (model, AutoTokenizer.from_pretrained(bundled("vlm")), Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread costs tensors as small as these more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    """Eight frames of noise, wider than high."""
    return np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
