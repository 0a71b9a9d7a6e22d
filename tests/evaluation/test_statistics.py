"""Figures on made-up scores, against values that can be counted by hand or that scipy gives by other ways."""

import numpy as np
import pytest
from scipy import stats

from prophy.evaluation.statistics import FEWEST_UNITS, compare, correlate, estimate


def test_too_few_units_make_no_figure() -> None:
    few = [1.0, 0.0, 1.0, 1.0, 0.0]
    assert len(few) == FEWEST_UNITS - 1
    assert estimate(few) is None
    assert compare(few, few) is None
    assert correlate(np.eye(5), np.eye(5)) is None
    assert estimate([*few, 1.0]) is not None


def test_a_share_has_wilsons_interval() -> None:
    found = estimate([1.0] * 8 + [0.0] * 2)
    assert found is not None
    # By the formula: (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n).
    assert (found.mean, found.num_units) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_a_mean_has_an_interval_close_to_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = estimate(values.tolist())
    assert found is not None
    low, high = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)


def test_values_that_are_all_alike_have_no_width() -> None:
    found = estimate([0.25] * 7)
    assert found is not None
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_yes_and_no_are_compared_by_mcnemar() -> None:
    ours = [1.0] * 9 + [0.0] + [1.0] * 10
    theirs = [0.0] * 9 + [1.0] + [1.0] * 10
    found = compare(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(8 / 20)
    # 9 of 10 units that differ go one way: 2 (1 + 10) / 2^10.
    assert found.p_value == pytest.approx(22 / 1024)
    assert found.low < found.mean < found.high
    assert found.low > 0


def test_answers_that_never_differ_leave_room_for_what_could_be_missed() -> None:
    found = compare([1.0] * 20, [1.0] * 20)
    assert found is not None
    assert (found.mean, found.p_value) == (0.0, 1.0)
    # With 20 of 20 alike, the share that differs may be up to 1 - 0.025^(1/20).
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 20))


def test_pairs_see_a_difference_that_the_spread_of_units_would_hide() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(0.0, 10.0, 40)
    ours = theirs + rng.normal(0.1, 0.1, 40)
    found = compare(ours.tolist(), theirs.tolist())
    assert found is not None
    assert found.low > 0 and found.p_value < 0.001
    # (1.96 + 0.84) standard errors of the difference.
    assert found.detectable == pytest.approx(2.802 * (ours - theirs).std(ddof=1) / np.sqrt(40), rel=1e-3)


def test_no_difference_is_seen_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.normal(0.0, 1.0, 60)
    found = compare((theirs + rng.permuted(np.repeat([-0.1, 0.1], 30))).tolist(), theirs.tolist())
    assert found is not None
    assert found.low < 0 < found.high
    assert found.p_value > 0.5


def test_what_could_be_detected_among_answers_is_never_less_than_mcnemar_can_see() -> None:
    found = compare([1.0] * 7 + [0.0], [1.0] * 8)
    assert found is not None
    # So large that 6 or more of 8 units differ in four of five comparisons.
    assert stats.binom.sf(5, 8, found.detectable) == pytest.approx(0.8, abs=1e-6)


def test_correlation_is_of_mean_vectors() -> None:
    rng = np.random.default_rng(3)
    first = np.array([0.7, 0.2, 0.1]) + rng.normal(0, 0.01, (12, 3))
    alike, opposite = first[::-1] + 0.001, 1 - first
    related, unrelated = correlate(first, alike), correlate(first, opposite)
    assert related is not None and unrelated is not None
    assert related.low > 0.99
    assert unrelated.high < -0.99


def test_the_same_scores_give_the_same_figures() -> None:
    values = np.random.default_rng(4).normal(size=30).tolist()
    assert estimate(values) == estimate(values)
    assert compare(values, values[::-1]) == compare(values, values[::-1])
