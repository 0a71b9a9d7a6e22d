"""Figures of made-up scores."""

from typing import Any

import pytest

from prophy.evaluation.comparison import (
    EVERYTHING,
    MEASURES,
    SEMANTIC_WEIGHT,
    correlations,
    figures,
    only_finite,
    ties,
)

[LOSS] = MEASURES["loss"]
PREFERS, COSTS = MEASURES["laws"]
RIGHT, _ = MEASURES["captions"]


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


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_in_no_figure_of_its_measure(broken: float) -> None:
    scores = [
        row(name, unit, 1.0 + unit, measure=measure, wrong=wrong, level=level)
        for name in ("first", "second")
        for unit in range(8)
        for measure, wrong in (("loss", None), ("laws", 2.0 + unit))
        for level in (0.6, 0.9)
    ]
    for score in scores:
        place = score["contestant"], score["unit"], score["level"]
        if place == ("second", "clip 3", 0.6):
            score["value"] = broken
        if place == ("second", "clip 4", 0.9) and score["measure"] == "laws":
            score["wrong"] = broken
    left, told = only_finite(scores)
    assert told == {"second": (2, 8)}
    numbers = {
        (figure.contestant, figure.level): figure.estimate.num_units
        for figure in figures(LOSS, left, ["first", "second"])
    }
    assert numbers == {("first", 0.6): 8, ("first", 0.9): 8, ("second", 0.6): 7, ("second", 0.9): 7}
    _, preferred = figures(
        PREFERS, [each for each in left if each["group"] == "everywhere"], ["first", "second"]
    )[:2]
    assert (preferred.contestant, preferred.estimate.num_units, preferred.estimate.mean) == ("second", 6, 0.0)


def test_a_contestant_without_any_number_has_no_figure() -> None:
    scores = [row("first", unit, float("nan"), measure="laws", wrong=float("nan")) for unit in range(8)]
    left, told = only_finite(scores)
    assert told == {"first": (8, 8)}
    assert figures(PREFERS, left, ["first"]) == [] == figures(COSTS, left, ["first"])


def test_the_same_loss_is_half_a_preference() -> None:
    scores = [row("first", unit, 1.0, measure="laws", wrong=1.0) for unit in range(8)]
    scores += [row("first", unit, 1.0, measure="captions", wrong=1.0) for unit in range(8)]
    for measure in (PREFERS, RIGHT):
        assert {figure.estimate.mean for figure in figures(measure, scores, ["first"])} == {0.5}


def test_what_is_the_same_at_every_level_is_a_tie() -> None:
    scores = [
        row("first", unit, 1.0, measure="captions", level=level, wrong=wrong[unit])
        for level, wrong in ((0.6, (1.0, 1.0, 2.0)), (0.9, (1.0, 2.0, 2.0)))
        for unit in range(3)
    ]
    assert ties([*scores, row("first", 3, 1.0)]) == (1, 3)


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
