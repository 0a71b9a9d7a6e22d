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


def test_a_mean_of_few_lies_between_the_outermost_means_of_subsets() -> None:
    found = estimate([1.25, 2.0, 3.0, 4.0, 5.0, 6.75])
    assert found is not None
    # Of 6 units there are 63 means, and 5 % leaves one of 64 places at either end.
    assert (found.low, found.high) == (1.25, 6.75)
    found = estimate([1.25, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert found is not None
    # Of 256 places 6 are beyond either end: 1.25, 1.625, 2, 2.0833, 2.125, 2.4167.
    assert found.low == pytest.approx((1.25 + 2 + 4) / 3)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_intervals_of_few_hold_the_true_mean_as_often_as_they_say(draw: str) -> None:
    values = getattr(np.random.default_rng(5), draw)(size=(1000, 8))
    true = {"normal": 0.0, "uniform": 0.5}[draw]
    found = [estimate(row.tolist()) for row in values]
    share = np.mean([each is not None and each.low <= true <= each.high for each in found])
    assert share > 0.94, "percentiles of a bootstrap hold it in 89 %"


@pytest.mark.parametrize("number", [6, 7, 9, 12, 20])
def test_an_interval_holds_nothing_just_where_p_is_above_5_percent(number: int) -> None:
    rng = np.random.default_rng(number)
    for _ in range(40):
        values = np.round(rng.normal(rng.choice([0.0, 0.7, 1.2]), 1.0, number), 1)
        found = compare((values + 3).tolist(), [3.0] * number)
        assert found is not None
        assert (found.low <= 0 <= found.high) == (found.p_value > 0.05)


@pytest.mark.parametrize("number", [6, 8, 24])
def test_an_interval_of_answers_holds_nothing_just_where_p_is_above_5_percent(number: int) -> None:
    for better in range(number + 1):
        for worse in range(number + 1 - better):
            alike = [1.0] * (number - better - worse)
            found = compare([1.0] * better + [0.0] * worse + alike, [0.0] * better + [1.0] * worse + alike)
            assert found is not None
            assert (found.low <= 0 <= found.high) == (found.p_value > 0.05)
            assert found.low <= found.mean <= found.high and found.high - found.low > 0.1


def test_p_is_that_of_all_flips_of_signs() -> None:
    differences = np.random.default_rng(6).normal(0.5, 1.0, 9)
    found = compare(differences.tolist(), [0.0] * 9)
    assert found is not None
    signs = 1 - 2 * (np.arange(2**9)[:, None] >> np.arange(9) & 1)
    sums = np.abs(signs @ differences)
    assert found.p_value == pytest.approx(np.mean(sums >= abs(differences.sum()) - 1e-12))


@pytest.mark.parametrize("number", [6, 8, 12])
def test_what_is_detectable_is_seen_in_four_of_five_comparisons(number: int) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=number)
    found = compare(((values - values.mean()) / values.std(ddof=1)).tolist(), [0.1] * number)
    assert found is not None and found.detectable is not None
    drawn = rng.normal(found.detectable, 1.0, (400, number))
    seen = [compare(row.tolist(), [0.0] * number) for row in drawn]
    assert np.mean([each is not None and each.p_value <= 0.05 for each in seen]) > 0.74


def test_what_says_nothing_of_chance_says_no_size_that_could_be_seen() -> None:
    found = compare([0.3] * 7, [0.1] * 7)
    assert found is not None and found.detectable is None
    none = compare([1.0] * 3 + [0.0] * 3, [0.0] * 3 + [1.0] * 3)
    assert none is not None and none.detectable is None


def test_values_that_are_no_numbers_are_refused() -> None:
    values, broken = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [float("nan"), 0.2, 0.3, float("inf"), 0.5, 0.6]
    with pytest.raises(ValueError, match="2 of 6 values are not finite"):
        estimate(broken)
    with pytest.raises(ValueError, match="2 of 6 values are not finite"):
        compare(values, broken)
    with pytest.raises(ValueError, match="1 of 18 values are not finite"):
        correlate(np.eye(6, 3), np.where(np.eye(6, 3), [np.nan, 1, 1], 0))


def test_a_tie_is_half_an_answer() -> None:
    found = estimate([0.5] * 10)
    assert found is not None
    assert (found.mean, found.low) == (0.5, pytest.approx(1 - found.high))
    assert found.low == pytest.approx(0.2366, abs=1e-4), "as 5 of 10"


def test_two_experts_or_a_router_that_gives_all_the_same_have_no_correlation() -> None:
    rng = np.random.default_rng(8)
    weights = rng.dirichlet([1.0, 1.0, 1.0], 12)
    assert correlate(weights[:, :2], weights[:, :2]) is None
    assert correlate(weights[:, :1], weights[:, :1]) is None
    assert correlate(weights, np.full((12, 3), 1 / 3)) is None


def test_a_unit_that_a_router_gives_all_the_same_leaves_the_correlation_its_ends() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.dirichlet([1.0, 1.0, 1.0], 6), rng.dirichlet([1.0, 1.0, 1.0], 6)
    ours[0] = 1 / 3
    found = correlate(ours, theirs)
    assert found is not None
    assert -1 <= found.low < found.high <= 1


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
    # By the score test, z^2 / (n + z^2).
    assert found.high == pytest.approx(-found.low) == pytest.approx(3.8415 / 23.8415, abs=1e-4)


def test_the_interval_of_paired_shares_is_tangos() -> None:
    found = compare([1.0] * 12 + [0.0] * 2 + [1.0] * 36, [0.0] * 12 + [1.0] * 2 + [1.0] * 36)
    assert found is not None

    def far(difference: float) -> float:
        better, worse, number = 12, 2, 50
        down = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200001)[1:-1]
        chances = better * np.log(down + difference) + worse * np.log(down)
        likely = down[np.argmax(chances + (number - 14) * np.log1p(-2 * down - difference))]
        spread = number * (2 * likely + difference - difference**2)
        return (better - worse - number * difference) / np.sqrt(spread)

    assert far(found.low) == pytest.approx(1.96, abs=1e-3)
    assert far(found.high) == pytest.approx(-1.96, abs=1e-3)


def test_a_tie_of_both_is_a_pair_that_does_not_differ() -> None:
    ours, theirs = [0.0] * 2 + [1.0] * 97, [1.0] * 99
    assert compare([*ours, 0.5], [*theirs, 0.5]) == compare([*ours, 1.0], [*theirs, 1.0])
    found = compare([0.5] + [1.0] * 99, [1.0] * 100)
    assert found is not None
    assert found.low < -0.02 and found.high > 0.01 and found.p_value == 1.0, "half a unit that differs"


def test_pairs_see_a_difference_that_the_spread_of_units_would_hide() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(0.0, 10.0, 40)
    ours = theirs + rng.normal(0.1, 0.1, 40)
    found = compare(ours.tolist(), theirs.tolist())
    assert found is not None
    assert found.low > 0 and found.p_value < 0.001
    # More than (1.96 + 0.84) standard errors of the difference, by Student's distribution of 39.
    assert found.detectable == pytest.approx(2.88 * (ours - theirs).std(ddof=1) / np.sqrt(40), rel=1e-2)


def test_no_difference_is_seen_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.normal(0.0, 1.0, 60)
    found = compare((theirs + rng.permuted(np.repeat([-0.1, 0.1], 30))).tolist(), theirs.tolist())
    assert found is not None
    assert found.low < 0 < found.high
    assert found.p_value > 0.5


def test_what_could_be_detected_among_answers_is_never_less_than_mcnemar_can_see() -> None:
    found = compare([1.0] * 7 + [0.0], [1.0] * 8)
    assert found is not None and found.detectable is not None
    # So large that 6 or more of 8 units differ in four of five comparisons.
    assert stats.binom.sf(5, 8, found.detectable) == pytest.approx(0.8, abs=1e-6)
    found = compare([1.0] * 8 + [0.0] * 4 + [1.0] * 28, [0.0] * 8 + [1.0] * 4 + [1.0] * 28)
    assert found is not None and found.detectable is not None
    rng, worse = np.random.default_rng(9), 4 / 40
    drawn = rng.multinomial(40, [worse + found.detectable, worse, 1 - 2 * worse - found.detectable], 4000)
    p = [stats.binomtest(int(a), int(a + b)).pvalue for a, b, _ in drawn]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.8, abs=0.03)


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
