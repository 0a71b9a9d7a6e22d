"""Figures of made-up scores."""

from typing import Any

import pytest

from prophy.evaluation.comparison import EVERYTHING, MEASURES, SEMANTIC_WEIGHT, correlations, figures

[LOSS] = MEASURES["loss"]
PREFERS, COSTS = MEASURES["laws"]


def row(contestant: str, unit: int, value: float, **others: Any) -> dict[str, Any]:
    base = {"measure": "loss", "group": "everywhere", "level": 0.9, "wrong": None}
    return base | {"contestant": contestant, "unit": f"clip {unit}", "value": value} | others


def test_each_contestant_is_compared_with_the_first_on_common_units() -> None:
    scores = [row("first", unit, unit) for unit in range(10)]
    scores += [row("second", unit, unit + 0.5) for unit in range(2, 12)]
    first, second = figures(LOSS, scores, ["first", "second"])
    assert first.difference is None
    assert (first.estimate.mean, second.estimate.mean) == (4.5, 7.0)
    assert second.difference is not None
    assert (second.difference.mean, second.difference.num_units) == (0.5, 8)


def test_levels_and_groups_are_figures_of_their_own() -> None:
    scores = [
        row("first", unit, unit, level=level, group=group)
        for unit in range(6)
        for level in (0.9, 0.6)
        for group in ("inside", "outside")
    ]
    found = [(figure.level, figure.group) for figure in figures(LOSS, scores, ["first"])]
    assert found == [(0.6, "inside"), (0.6, "outside"), (0.9, "inside"), (0.9, "outside")]


def test_what_too_few_units_say_is_no_figure() -> None:
    scores = [row("first", unit, unit) for unit in range(8)] + [
        row("second", unit, unit) for unit in range(5)
    ]
    assert [figure.contestant for figure in figures(LOSS, scores, ["first", "second"])] == ["first"]


def test_a_broken_law_is_preferred_where_its_loss_over_all_levels_is_not_higher() -> None:
    wrongs = [(0.5, 2.0), (0.5, 1.4), (2.0, 2.0)]  # of levels .6 and .9; the true twin has 1 at both
    scores = [
        row("first", unit, 1.0, measure="laws", group=group, level=level, wrong=wrong[place])
        for group, wrong in zip(("gravity", "volume", "time"), wrongs, strict=True)
        for unit in range(6)
        for place, level in enumerate((0.6, 0.9))
    ]
    for score in scores:
        score["unit"] += score["group"]
    found = {figure.group: figure.estimate for figure in figures(PREFERS, scores, ["first"])}
    assert {group: figure.mean for group, figure in found.items()} == {
        EVERYTHING: pytest.approx(1 / 3),
        "gravity": 0.0,
        "volume": 1.0,
        "time": 0.0,
    }
    assert found[EVERYTHING].num_units == 18
    costs = {figure.group: figure.estimate.mean for figure in figures(COSTS, scores, ["first"])}
    assert costs["gravity"] == pytest.approx(25.0)
    assert costs["volume"] == pytest.approx(-5.0)


def test_correlation_is_of_the_weights_of_two_phenomena() -> None:
    weights = {"combustion": (0.8, 0.1, 0.1), "explosion": (0.7, 0.2, 0.1), "refraction": (0.1, 0.1, 0.8)}
    scores = [
        row("first", unit, value, measure=f"{SEMANTIC_WEIGHT}{expert}", group=phenomenon, level=None)
        for phenomenon, values in weights.items()
        for unit in range(6)
        for expert, value in enumerate(values)
    ]
    pairs = (("combustion", "explosion"), ("explosion", "refraction"))
    found = correlations(scores, ["first", "without a branch"], pairs)
    assert {key[0] for key in found} == {"first"}
    assert found["first", *pairs[0]].mean > 0.9
    assert found["first", *pairs[1]].mean < 0
