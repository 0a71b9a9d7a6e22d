"""Means and paired differences with their intervals. What is resampled is a unit: a clip, a pair, a prompt.

Where there are too few units for an interval there is no figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST_UNITS = 6
"""With fewer, not even units that all say the same make a difference that is significant at 5 %."""

CONFIDENCE = 0.95
_POWER = 0.8
_RESAMPLES = 4999


@dataclass(frozen=True)
class Estimate:
    """A mean over units.

    Attributes:
        mean: the units' mean.
        low: lower end of its 95 % interval.
        high: upper end.
        num_units: units.
    """

    mean: float
    low: float
    high: float
    num_units: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of paired differences.

    Attributes:
        p_value: probability of a difference at least this large if there were none.
        detectable: a true difference of this size would be significant in four of five such comparisons.
    """

    p_value: float
    detectable: float


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of one value per unit; None for fewer than `FEWEST_UNITS`.

    The interval is Wilson's where all values are 0 or 1, else by bootstrap over the units (percentiles).
    """
    array = np.asarray(values, float)
    if len(array) < FEWEST_UNITS:
        return None
    if _are_answers(array):
        test = stats.binomtest(int(array.sum()), len(array))
        low, high = test.proportion_ci(CONFIDENCE, method="wilson")
    else:
        low, high = _bootstrap(array)
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def compare(values: Sequence[float], baseline: Sequence[float]) -> Difference | None:
    """The mean of `values` minus `baseline`, unit by unit; None for fewer than `FEWEST_UNITS` units.

    The interval is by bootstrap over the units (percentiles). The p-value is McNemar's exact one where all
    values are 0 or 1, else that of a permutation test, which exchanges the two values of a unit.
    """
    ours, theirs = np.asarray(values, float), np.asarray(baseline, float)
    differences = ours - theirs
    number = len(differences)
    if number < FEWEST_UNITS:
        return None
    are_answers = _are_answers(ours) and _are_answers(theirs)
    error = differences.std(ddof=1) / np.sqrt(number)
    detectable = float((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(_POWER)) * error)
    low, high = _bootstrap(differences)
    if are_answers:
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        # McNemar needs so many units that differ, all one way: the least that can be seen at all.
        needed = FEWEST_UNITS
        detectable = max(detectable, float(stats.beta.ppf(_POWER, needed, number - needed + 1)))
        if not better + worse:  # nothing to resample: as many may differ as could have been missed
            high = stats.binomtest(0, number).proportion_ci(CONFIDENCE, method="exact").high
            low = -high
    elif differences.any():
        test = stats.permutation_test(
            (ours, theirs),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=_RESAMPLES,
            rng=np.random.default_rng(0),
        )
        p_value = test.pvalue
    else:
        p_value = 1.0
    return Difference(
        float(differences.mean()), float(low), float(high), number, float(p_value), float(detectable)
    )


def correlate(first: np.ndarray, second: np.ndarray) -> Estimate | None:
    """Correlation of the mean vectors of two groups of units, with an interval by bootstrap over both.

    Args:
        first: `[N, D]`, a vector per unit.
        second: `[M, D]`.

    Returns:
        None where a group has fewer than `FEWEST_UNITS`; `num_units` is that of the smaller.
    """
    number = min(len(first), len(second))
    if number < FEWEST_UNITS:
        return None

    def correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.corrcoef(first[ours].mean(0), second[theirs].mean(0))[0, 1])

    units = np.arange(len(first)), np.arange(len(second))
    interval = stats.bootstrap(
        units,
        correlation,
        vectorized=False,
        n_resamples=999,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(correlation(*units), float(interval.low), float(interval.high), number)


def _are_answers(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    if not np.ptp(values):
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high
