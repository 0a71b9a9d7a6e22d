"""From scores to figures: what each contestant reaches, and how it differs from the first, unit by unit."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from prophy.evaluation.statistics import Difference, Estimate, compare, correlate, estimate

Row = Mapping[str, Any]
"""A score: `contestant`, `measure`, `group`, `unit`, `level`, `value` and `wrong`."""

EVERYTHING = "all"
"""The group of all groups of a measure."""


@dataclass(frozen=True)
class Measure:
    """What scores say.

    Attributes:
        title: a heading.
        text: what it is, in a sentence or two.
        source: the `measure` of the scores.
        score: all scores of a unit in one group -> its value.
        lower_is_better: which way is good.
        by_level: whether each level of noise is counted by itself.
        pooled: whether there is a figure of all groups together.
    """

    title: str
    text: str
    source: str
    score: Callable[[Sequence[Row]], float]
    lower_is_better: bool = False
    by_level: bool = True
    pooled: bool = False


@dataclass(frozen=True)
class Figure:
    """What a contestant reaches in a group at a level, and how it differs from the first.

    `difference` is None for the first itself, and where too few units are measured for both.
    """

    measure: Measure
    group: str
    level: float | None
    contestant: str
    estimate: Estimate
    difference: Difference | None


def only_finite(scores: Iterable[Row]) -> tuple[list[Row], dict[str, tuple[int, int]]]:
    """Leaves a unit out of every figure of a measure for whose contestant one of its losses is not finite.

    Returns:
        The scores that are left; and for each contestant that lost any, how many of its clips are concerned
        in some measure, and how many it has.
    """
    rows = list(scores)
    units: dict[str, set[str]] = defaultdict(set)
    broken: dict[str, set[str]] = defaultdict(set)
    out = set()
    for row in rows:
        is_finite = all(np.isfinite(row[key]) for key in ("value", "wrong") if row[key] is not None)
        if not is_finite:
            out.add(_of_unit(row))
        if row["level"] is not None:  # a clip is denoised at levels; captions alone and prompts have none
            units[row["contestant"]].add(row["unit"])
            if not is_finite:
                broken[row["contestant"]].add(row["unit"])
    left = [row for row in rows if _of_unit(row) not in out]
    return left, {name: (len(found), len(units[name])) for name, found in broken.items()}


def ties(scores: Iterable[Row]) -> tuple[int, int]:
    """How many wrong captions and clips are, at all levels, the right one to all contestants; of how many.

    Those of one unit in one group count as one.
    """
    same: dict[tuple[str, str, str], bool] = {}
    for row in scores:
        if row["wrong"] is not None:
            place = row["measure"], row["group"], row["unit"]
            same[place] = same.get(place, True) and row["wrong"] == row["value"]
    return sum(same.values()), len(same)


def _of_unit(row: Row) -> tuple[str, str, str]:
    return row["contestant"], row["measure"], row["unit"]


def figures(measure: Measure, scores: Sequence[Row], contestants: Sequence[str]) -> list[Figure]:
    """The figures of one measure; none where there are too few units for an interval.

    Args:
        measure: what scores say.
        scores: the rows of all measures, all finite.
        contestants: names, the one first that the others are compared with.
    """
    cells: dict[tuple[str, float | None], dict[str, dict[str, list[Row]]]] = {}
    for row in scores:
        if row["measure"] != measure.source:
            continue
        level = row["level"] if measure.by_level else None
        groups = [EVERYTHING] * measure.pooled + [row["group"]]
        for group in groups:
            cell = cells.setdefault((group, level), defaultdict(lambda: defaultdict(list)))
            cell[row["contestant"]][row["unit"]].append(row)
    found = []
    for (group, level), by_contestant in sorted(cells.items(), key=_place):
        values = {
            name: {unit: measure.score(rows) for unit, rows in by_contestant[name].items()}
            for name in contestants
        }
        first = values[contestants[0]]
        for name in contestants:
            mean = estimate(list(values[name].values()))
            if mean is None:
                continue
            units = [unit for unit in values[name] if unit in first]
            difference = None
            if name != contestants[0]:
                difference = compare([values[name][unit] for unit in units], [first[unit] for unit in units])
            found.append(Figure(measure, group, level, name, mean, difference))
    return found


def correlations(
    scores: Sequence[Row], contestants: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str, str], Estimate]:
    """Correlation of the mean semantic weights of two phenomena, by (contestant, phenomenon, phenomenon)."""
    weights: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in scores:
        if row["measure"].startswith(SEMANTIC_WEIGHT):
            weights[row["contestant"], row["group"]][row["unit"]][row["measure"]] = row["value"]

    def vectors(name: str, phenomenon: str) -> np.ndarray:
        rows = [[row[key] for key in sorted(row)] for row in weights[name, phenomenon].values()]
        return np.array(rows)

    found = {}
    for name, (first, second) in product(contestants, pairs):
        if (between := correlate(vectors(name, first), vectors(name, second))) is not None:
            found[name, first, second] = between
    return found


SEMANTIC_WEIGHT = "semantic weight "
"""Begins the `measure` of the weight of each semantic expert."""


def _place(cell: tuple[tuple[str, float | None], Any]) -> tuple[float, bool, str]:
    (group, level), _ = cell
    return level or 0.0, group != EVERYTHING, group


def _value(rows: Sequence[Row]) -> float:
    return float(np.mean([row["value"] for row in rows]))


def _prefers_right(rows: Sequence[Row]) -> float:
    """1 or 0; 0.5 where both losses are the same number."""
    return (1 + float(np.sign(_wrong(rows) - _value(rows)))) / 2


def _prefers_wrong(rows: Sequence[Row]) -> float:
    return 1 - _prefers_right(rows)


def _wrong(rows: Sequence[Row]) -> float:
    return float(np.mean([row["wrong"] for row in rows]))


def _gap(rows: Sequence[Row]) -> float:
    return 100 * (_wrong(rows) / _value(rows) - 1)


MEASURES: dict[str, tuple[Measure, ...]] = {
    "loss": (
        Measure(
            "Loss of clips",
            "Mean squared error of the prediction, by level of noise. Lower is better.",
            "loss",
            _value,
            lower_is_better=True,
        ),
    ),
    "captions": (
        Measure(
            "The right caption is preferred",
            "Share of clips whose right caption gives a lower loss than the same words with one thing wrong, "
            "or in a cache than the caption of another video, in the same noise; clips of one video count as "
            "one, and the same loss as a half. Who does not read the text is at 0.5. Higher is better.",
            "captions",
            _prefers_right,
        ),
        Measure(
            "How much the wrong caption costs",
            "By how much the loss is higher with the wrong caption, in per cent. Higher is better.",
            "captions",
            _gap,
        ),
    ),
    "laws": (
        Measure(
            "A broken law is preferred",
            "Plausibility preference error (LikePhys): share of pairs in which the clip that breaks the law "
            "gives a lower loss than its true twin, in the same noise, over all levels; the same loss counts "
            "as a half. Chance is 0.5. Lower is better.",
            "laws",
            _prefers_wrong,
            lower_is_better=True,
            by_level=False,
            pooled=True,
        ),
        Measure(
            "How much a broken law costs",
            "By how much the loss of the clip that breaks the law is higher, in per cent. Higher is better.",
            "laws",
            _gap,
            by_level=False,
            pooled=True,
        ),
    ),
    "routing": (
        Measure(
            "Routing: where, and which",
            "AUROC of the branch's maps: where a phenomenon is against the rest of the frame, and which of "
            "two it is. Chance is 0.5. Higher is better.",
            "routing",
            _value,
        ),
    ),
    "videos": (
        Measure(
            "Videos: what is asked for",
            "Share of videos that show every phenomenon of their prompt, wherever it is. Higher is better.",
            "video: what",
            _value,
            by_level=False,
            pooled=True,
        ),
        Measure(
            "Videos: what is asked for, where it is asked for",
            "Share of videos with every phenomenon on its side. Higher is better.",
            "video: what and where",
            _value,
            by_level=False,
            pooled=True,
        ),
        Measure(
            "Videos: all right",
            "Share of videos with every phenomenon on its side in its colour. Higher is better.",
            "video: all right",
            _value,
            by_level=False,
            pooled=True,
        ),
        Measure(
            "Videos: shapes",
            "Intersection over union of what is drawn with the nearest of 8 simulations of the same prompt. "
            "Higher is better.",
            "video: shape",
            _value,
            by_level=False,
            pooled=True,
        ),
        Measure(
            "Falls: the law",
            "Share of falling balls whose acceleration, by a fit of fall and bounces, is that of gravity. "
            "Higher is better.",
            "video: fall",
            _value,
            by_level=False,
        ),
        Measure(
            "Falls: one ball all the time",
            "Shares of a video's frames that show the ball, and that show more than one.",
            "video: object",
            _value,
            by_level=False,
        ),
    ),
}
"""The measures of each kind of score, by the name that a configuration has for it."""
