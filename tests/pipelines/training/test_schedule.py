"""The learning rate over the steps, by hand."""

import pytest

from pipelines.config import load_config
from pipelines.training.schedule import learning_rate_factor


def factors(**values: object) -> list[float]:
    """The share of the learning rate in each step, and in one more."""
    train = load_config("tiny").train.model_copy(update={"num_steps": 8, "warmup_steps": 4, **values})
    return [learning_rate_factor(train, step) for step in range(train.num_steps + 1)]


def test_warm_up_rises_in_even_steps_to_a_constant() -> None:
    assert factors(lr_schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert factors(lr_schedule="constant", warmup_steps=0) == [1] * 9


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero() -> None:
    half = 0.5**0.5
    falling = [0.5 * (1 + cosine) for cosine in (1, half, 0, -half, -1)]
    assert factors(lr_schedule="cosine") == pytest.approx([0.25, 0.5, 0.75, 1, *falling])


def test_without_warm_up_the_cosine_spans_all_steps() -> None:
    assert factors(lr_schedule="cosine", warmup_steps=0)[::4] == pytest.approx([1, 0.5, 0])
