"""Scores of made-up answers: what is the same, and what is no number."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from pipelines.config import Config
from pipelines.evaluation.items import Clip, Item, Wrong
from pipelines.evaluation.stages import DenoiseItems, Inputs
from prophy.evaluation.denoising import Answer, Denoiser, Question
from prophy.models.control import RoutingOutput
from prophy.training.data import ClipShape

GRID = (1, 2, 2)
WRONG = Wrong(measure="captions", kind="mine", caption="a cat")
ITEM = Item(unit="a.mp4", clip=Clip(path="a.mp4"), caption="a ball", wrong=(WRONG, WRONG), is_measured=True)


class Answering:
    """Another error for each question, as batches round, and maps that hold a value."""

    def __init__(self, in_maps: float) -> None:
        self.transformer = SimpleNamespace(physics=SimpleNamespace(phenomena=["melting"]))
        self._in_maps = in_maps

    def answer(self, questions: Sequence[Question], grid: tuple[int, int, int]) -> Iterator[Answer]:
        for index in range(len(questions)):
            maps = torch.arange(4.0).reshape(1, 4, 1) + self._in_maps
            yield Answer(torch.full(grid, 1.0 + index), RoutingOutput(phenomenon_maps=maps))


def scores(config: Config, in_maps: float = 0.0) -> list[dict[str, Any]]:
    latents, text = torch.zeros(1, *GRID), {"prompt_embeds": torch.zeros(2, 3)}
    # One wrong text was cut to the right one, the other was not.
    wrong = [(latents, {"prompt_embeds": torch.zeros(2, 3)}), (latents, {"prompt_embeds": torch.ones(2, 3)})]
    masks = {"melting": np.array([[[True, False], [False, False]]])}
    stage = DenoiseItems(config, [], ClipShape(1, (1, *GRID), GRID), None, [])
    denoiser = cast(Denoiser, Answering(in_maps))
    return list(stage._score(denoiser, ITEM, Inputs(latents, text, wrong, masks)))


def test_a_text_that_is_cut_to_the_right_one_has_the_very_same_loss(config: Config) -> None:
    pairs = [row for row in scores(config) if row["measure"] == "captions"]
    number = len(config.evaluate.noise_levels)
    assert [row["wrong"] == row["value"] for row in pairs] == [True, False] * number


def test_maps_that_are_no_numbers_are_no_score(config: Config) -> None:
    def measures(in_maps: float) -> set[str]:
        return {row["measure"] for row in scores(config, in_maps)}

    assert measures(0.0) == {"loss", "captions", "routing"}
    assert measures(float("nan")) == {"loss", "captions"}
