"""The teacher at a 32B's width: what a token of its answers takes, and whether its maps are the CPU's."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from prophy.priors.attention import ATTENTION
from prophy.priors.conversation import Conversation
from prophy.priors.cost import PUBLISHED, vlm_cost
from prophy.priors.questionnaire import BACKGROUND, CAPTION, ask_presence
from prophy.priors.qwen_vl import Qwen25VL
from prophy.tiny import bundled
from tests.gpu.models import DEVICE, GPU
from tests.gpu.rows import Row, relative, timed, within
from tests.wisa import WISA

NUM_LAYERS = 8  # of 64: what is measured grows with them
NUM_TOKENS = 32
BYTES_PER_S = 2e12  # as `prophy plan` assumes
PRESENCE = ask_presence(WISA)


class RandomVLM(Qwen25VL):
    """A Qwen2.5-VL of random weights in bfloat16, with the embedded one's tokenizer.

    Args:
        settings: its `config.json`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config: Any = AutoConfig.for_model(**settings)
        torch.manual_seed(0)
        with DEVICE:
            self.model: Any = Qwen2_5_VLForConditionalGeneration(config).bfloat16().eval()
        self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = AutoTokenizer.from_pretrained(bundled("vlm"))
        processor = AutoImageProcessor.from_pretrained(bundled("vlm"))
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)

    def talk(self, frames: np.ndarray, num_clips: int) -> Conversation:
        """About as many clips of these frames, with the questions of a first round."""
        videos = self.watch([frames] * num_clips, [3.0] * num_clips)
        tails = [self.split_prompt(question.text)[1] for question in (CAPTION, PRESENCE, BACKGROUND)]
        ids = [self.tokenizer(tail, add_special_tokens=False).input_ids for tail in tails]
        return Conversation(self.model, videos, [(row, tail) for row in range(num_clips) for tail in ids])


@torch.inference_mode()
def check() -> Iterator[Row]:
    """Clips of the presets' size; then maps of a small one, in bfloat16 here and in float32 on the CPU."""
    settings = published() if GPU else AutoConfig.from_pretrained(bundled("vlm")).to_dict()
    vlm = RandomVLM(settings)
    shape = (16, 308, 532) if GPU else (4, 32, 48)
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cost = vlm_cost(settings, "bfloat16", WISA, shape, None, NUM_TOKENS)
    assert cost is not None
    steps = {}
    for num_clips in (1, 4):
        talk = vlm.talk(frames, num_clips)
        one, all_ = (timed(partial(talk.say, count, ()), repeats=2) for count in (1, NUM_TOKENS + 1))
        steps[num_clips] = (all_ - one) / NUM_TOKENS
        planned = (cost.step_bytes + num_clips * cost.clip_bytes) / BYTES_PER_S
        yield Row(
            f"VLM, {vlm.num_layers} layers, {num_clips} clips: a token of each of 3 answers",
            f"{1000 * steps[num_clips]:.3g} ms" + (f", planned {1000 * planned:.3g}" if GPU else ""),
            "at most 50 % more" if GPU else None,
            steps[num_clips] < 1.5 * planned or not GPU,
        )
    ratio = steps[4] / steps[1]
    yield Row(
        "4 clips against 1", f"{ratio:.2f} times as long", "below 2" if GPU else None, ratio < 2 or not GPU
    )

    side = 4 * settings["vision_config"]["patch_size"]
    small = np.random.default_rng(1).integers(0, 256, (4, side, 2 * side, 3), dtype=np.uint8)
    found = maps(vlm, small)
    vlm.model.float().cpu()
    for index, expected in enumerate(maps(vlm, small)):
        yield within(f"map {index} in bfloat16 against the CPU's", relative(found[index], expected), 1e-2)


def published() -> dict[str, Any]:
    """The 32B's settings with fewer layers, and the tokens that the embedded tokenizer has for a video."""
    settings, tiny = (
        dict(PUBLISHED["Qwen/Qwen2.5-VL-32B-Instruct"]),
        AutoConfig.from_pretrained(bundled("vlm")),
    )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return settings | {
        "text_config": settings["text_config"] | {"num_hidden_layers": NUM_LAYERS},
        **{name: getattr(tiny, name) for name in names},
    }


def maps(vlm: RandomVLM, frames: np.ndarray) -> Sequence[torch.Tensor]:
    """Where given answers look: another device may find other tokens the likeliest."""
    said = [[20, 21, 22, 23], [30, 31, 32], [40, 41]]
    return vlm.talk(frames, 1).look(said, range(vlm.num_layers), None)
