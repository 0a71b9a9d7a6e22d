"""What the product asks of a vision-language model, and the models that there are.

A model is shown a video once and asked many questions about it; with each answer it says where in the video
it looked meanwhile. It is given several videos at a time, to answer about them as one batch if it can. Other
packages add models by entry points (`prophy.registry`).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig

from prophy.errors import ProPhyError
from prophy.models.stored import local_folder
from prophy.registry import Registry
from prophy.stores import is_in_s3
from prophy.tiny import EMBEDDED, bundled

SliceTimes = tuple[tuple[float, float], ...]
"""When the first and the last frame of each slice of a map are, in seconds after the clip's first frame."""


@dataclass(frozen=True)
class Answer:
    """What the VLM said, and where it looked while it said it.

    Attributes:
        text: the answer without special tokens.
        token_ids: the generated tokens, without the one that ends the answer.
        attention: `[T, H, W]` float32 on the CPU: attention of the answer's tokens to the video's, mean over
            tokens, chosen heads and layers; not normalised over the video. All zero for an empty answer.
    """

    text: str
    token_ids: tuple[int, ...]
    attention: torch.Tensor


class WatchedVideo(Protocol):
    """What a model keeps of a video that it was shown."""

    @property
    def slice_times(self) -> SliceTimes:
        """Which times the `T` slices of every answer's map cover, ascending."""


class VideoLanguageModel(Protocol):
    """A vision-language model that tells where it looks.

    It is made by `(source, revision, dtype, device_map)`: a folder or hub id, its revision, "float32" or
    "bfloat16", and transformers' `device_map` or None; it raises OSError or ValueError where that cannot be
    loaded.
    """

    @property
    def num_layers(self) -> int:
        """Number of language layers, whose attention can be kept."""

    @property
    def num_heads(self) -> int:
        """Number of attention heads of each of them."""

    def watch(self, videos: Sequence[np.ndarray], fps: Sequence[float]) -> Sequence[Any]:
        """Shows it videos.

        Args:
            videos: frames `[T, H, W, 3]` of each, uint8 RGB; T, H and W may differ between videos.
            fps: frame rate of each one's frames.

        Returns:
            A `WatchedVideo` of each, to be given to `answer`.

        Raises:
            ProPhyError: it cannot read frames of such a number or size.
        """

    def answer(
        self,
        videos: Sequence[Any],
        questions: Sequence[Sequence[str]],
        max_new_tokens: int,
        layers: Collection[int],
        heads: Collection[int] | None = None,
    ) -> Sequence[Sequence[Answer]]:
        """Answers questions, greedily, and keeps where each answer looks.

        Args:
            videos: what `watch` returned of at least one video; they are left as they were.
            questions: at least one about each video.
            max_new_tokens: an answer is cut there.
            layers: language layers whose attention is averaged.
            heads: heads of these layers that are averaged; None is all.
        """


VLMS = Registry(
    "prophy.vlms",
    {"qwen2_5_vl": "prophy.priors.qwen_vl:Qwen25VL", "qwen3_vl": "prophy.priors.qwen_vl:Qwen3VL"},
)
"""The class of a `VideoLanguageModel` by transformers' `model_type`, as the model's `config.json` has it."""


def load_vlm(pretrained: str, revision: str | None, dtype: str, device_map: str | None) -> VideoLanguageModel:
    """Loads a model by the class that fits it.

    Args:
        pretrained: hub id or folder, also in S3; "tiny" is the embedded one.
        revision: a hub id's; None is its main branch.
        dtype: "float32" or "bfloat16".
        device_map: as in transformers ("auto" spreads over the visible GPUs); None is this process's device.

    Raises:
        ProPhyError: there is no such model, it cannot be loaded, or it is of a kind that is not known.
    """
    revision = revision or "main"
    model_type = load_config(pretrained, revision)["model_type"]
    with _loading(pretrained):
        return VLMS[model_type](_source(pretrained), revision, dtype, device_map)


def load_config(pretrained: str, revision: str | None) -> dict[str, Any]:
    """The `config.json` of a model of a kind that is known; reads no weights.

    Raises:
        ProPhyError: as `load_vlm`.
    """
    with _loading(pretrained):
        # The file alone: a model of another package may be of a kind that transformers does not know.
        config, _ = PreTrainedConfig.get_config_dict(_source(pretrained), revision=revision or "main")
        model_type = str(config.get("model_type"))
        if model_type not in VLMS:
            raise ValueError(f"its model_type is {model_type}; give one of: {', '.join(VLMS)}")
        return config


def _source(pretrained: str) -> str:
    """Where transformers finds it: a folder of this machine, or a hub id."""
    if pretrained == EMBEDDED:
        return str(bundled("vlm"))
    return str(local_folder(pretrained)) if is_in_s3(pretrained) else pretrained


@contextmanager
def _loading(pretrained: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ProPhyError):
            raise
        reason = str(error).splitlines()[0]
        raise ProPhyError(f"cannot load vlm.pretrained {pretrained!r}: {reason}") from None
