import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from rliable import metrics
from rliable.library import get_interval_estimates

from rgpo.runs.statistics import (
    interval,
    probability_of_improvement,
    rank_test,
    relative_change,
    summarize,
)


def test_iqm_by_hand():
    # Eight scores: two go on each side, (3 + 4 + 5 + 6) / 4 remains.
    scores = [100.0, 1.0, 3.0, 2.0, 4.0, 5.0, 6.0, 90.0]
    summary = summarize({"a": scores})["a"]
    assert summary.iqm == pytest.approx(4.5)
    assert summary.median == pytest.approx(4.5)
    assert summary.mean == pytest.approx(211 / 8)
    assert summary.iqm == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
    assert summary.iqm_low < summary.iqm < summary.iqm_high
    assert summary.std == pytest.approx(np.std(scores, ddof=1))
    assert summary.cv == pytest.approx(summary.std / summary.mean)
    assert (summary.n, summary.single, summary.optimality_gap) == (8, False, None)


def test_median_of_one_task_is_the_median_and_not_rliables_mean():
    assert summarize({"a": [0.0, 1.0, 50.0]})["a"].median == 1.0


def test_relative_change_is_a_share_of_the_other_iqm():
    a, b = [3.0, 6.0, 6.0, 9.0], [4.0, 4.0, 4.0, 4.0]
    change = relative_change(a, b)
    assert change.share == pytest.approx(0.5)
    assert -0.25 <= change.low < 0.5 < change.high <= 1.25
    scaled = relative_change([100 * x for x in a], [100 * x for x in b])
    assert (scaled.low, scaled.high) == pytest.approx((change.low, change.high))
    alone = relative_change([6.0], b)
    assert (alone.share, alone.low, alone.high, alone.single) == (0.5, 0.5, 0.5, True)
    assert relative_change(a, [-1.0, 4.0, 4.0, 4.0]) is None  # a share of what may be nothing


def test_several_tasks_and_the_optimality_gap():
    scores = np.array([[1.0, 20.0], [3.0, 10.0], [2.0, 30.0], [2.0, 20.0]])
    summary = summarize({"a": scores}, target=[2.0, 20.0])["a"]
    assert summary.n == 4
    assert summary.iqm == pytest.approx(scipy.stats.trim_mean(scores.ravel(), 0.25))
    assert summary.std == pytest.approx(np.std([10.5, 6.5, 16.0, 11.0], ddof=1))
    # Of the target reached: 0.5, 1, 1, 1 and 1, 0.5, 1, 1.
    assert summary.optimality_gap == pytest.approx(1 - 7 / 8)
    with pytest.raises(ValueError, match="must be positive"):
        summarize({"a": scores}, target=-1.0)


def test_one_run_works_and_is_flagged():
    summary = summarize({"a": [7.0]})["a"]
    assert (summary.iqm_low, summary.iqm, summary.iqm_high) == (7.0, 7.0, 7.0)
    assert (summary.std, summary.cv, summary.n, summary.single) == (None, None, 1, True)
    improvement = probability_of_improvement([7.0], [5.0])
    assert (improvement.low, improvement.probability, improvement.high) == (1.0, 1.0, 1.0)
    assert improvement.single


def test_deterministic_given_the_seed_and_the_global_generator_is_left_alone():
    scores = np.random.default_rng(0).normal(size=9)
    other = scores + 0.3
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    one = summarize({"a": scores, "b": other}, seed=1)
    two = summarize({"b": other, "a": scores}, seed=1)
    improved = [probability_of_improvement(scores, other, seed=1) for _ in range(2)]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert one == two
    assert improved[0] == improved[1]
    assert one["a"] != summarize({"a": scores}, seed=2)["a"]
    assert (interval(scores[:, None], seed=1).low == interval(scores[:, None], seed=1).low).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials = 100
    summaries = summarize({str(i): rng.normal(3.0, 1.0, size=20) for i in range(trials)}, reps=200)
    covered = sum(s.iqm_low <= 3.0 <= s.iqm_high for s in summaries.values())
    assert 0.85 <= covered / trials <= 0.995  # the percentile bootstrap is a little short
    narrow = summarize({"a": rng.normal(size=20)}, confidence=0.5)["a"]
    wide = summarize({"a": rng.normal(size=20)}, confidence=0.99)["a"]
    assert narrow.iqm_high - narrow.iqm_low < wide.iqm_high - wide.iqm_low


def test_probability_of_improvement_counts_pairs_and_half_ties():
    improvement = probability_of_improvement([1.0, 2.0, 3.0], [0.0, 2.0])
    # Pairs won: 1>0, 2>0, 3>0, 3>2, and 2=2 counts half.
    assert improvement.probability == pytest.approx(4.5 / 6)
    assert 0 <= improvement.low < improvement.probability < improvement.high <= 1
    assert not improvement.single
    assert probability_of_improvement([1.0, 2.0], [1.0, 2.0]).probability == 0.5


def test_curves_point_by_point_with_gaps():
    rng = np.random.default_rng(1)
    curves = rng.normal(size=(8, 5))
    curves[:3, 3] = np.nan
    curves[:7, 4] = np.nan
    result = interval(curves)
    assert result.iqm[:3] == pytest.approx(scipy.stats.trim_mean(curves[:, :3], 0.25, axis=0))
    assert result.iqm[3] == pytest.approx(scipy.stats.trim_mean(curves[3:, 3], 0.25))
    assert (result.low[:4] < result.iqm[:4]).all()
    assert (result.iqm[:4] < result.high[:4]).all()
    assert result.low[4] == result.iqm[4] == result.high[4] == curves[7, 4]
    assert np.isnan(interval(np.full((2, 3), np.nan)).iqm).all()


def test_numbers_agree_with_rliable():
    """rliable resamples one by one from NumPy's global generator: the ends agree within noise."""
    np.random.seed(0)  # noqa: NPY002
    generator = np.random.default_rng(2)
    a, b = generator.normal(0.3, size=(12, 3)), generator.normal(size=(9, 3))
    summary = summarize({"a": a}, reps=4000, target=2.0)["a"]
    point, ends = get_interval_estimates(
        {"a": a}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=1000
    )
    assert summary.iqm == pytest.approx(point["a"][0])
    assert [summary.iqm_low, summary.iqm_high] == pytest.approx(ends["a"][:, 0], abs=0.05)
    assert summary.optimality_gap == pytest.approx(metrics.aggregate_optimality_gap(a / 2))
    improvement = probability_of_improvement(a, b, reps=4000)
    point, ends = get_interval_estimates(
        {"p": (a, b)},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=500,
    )
    assert improvement.probability == pytest.approx(point["p"][0])
    assert [improvement.low, improvement.high] == pytest.approx(ends["p"][:, 0], abs=0.05)


def test_a_curve_of_one_point_is_a_summary():
    scores = np.random.default_rng(2).normal(size=12)
    summary = summarize({"a": scores})["a"]
    curve = interval(scores[:, None])
    assert curve.iqm[0] == pytest.approx(summary.iqm)
    assert curve.low[0] == pytest.approx(summary.iqm_low, abs=0.05)
    assert curve.high[0] == pytest.approx(summary.iqm_high, abs=0.05)


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [[[1.0]]]])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="scores of a"):
        summarize({"a": bad})


def test_importing_does_not_pay_for_scipy():
    code = "import sys, rgpo.runs.statistics; print({'rliable', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_rank_test_of_one_task_is_scipys_exact_one():
    generator = np.random.default_rng(0)
    for n, m in ((3, 5), (5, 5), (2, 7), (1, 1)):
        a, b = generator.normal(0.5, size=n), generator.normal(size=m)
        exact = scipy.stats.mannwhitneyu(a, b, method="exact").pvalue
        assert rank_test(a, b) == pytest.approx(exact)
        assert rank_test(b, a) == pytest.approx(exact)


def test_rank_test_adds_tasks_up():
    # 2 against 2 runs: every win in two tasks, each with chance 1/6, and as many losses.
    assert rank_test([[3, 3], [4, 4]], [[1, 1], [2, 2]]) == pytest.approx(2 / 36)
    # one task against the other
    assert rank_test([[3, 1], [4, 2]], [[1, 3], [2, 4]]) == 1
    with pytest.raises(ValueError, match="same number of tasks"):
        rank_test([1.0], [[1.0, 2.0]])


def test_rank_test_with_ties_is_conservative():
    assert rank_test([1.0, 1.0], [1.0, 1.0]) == 1
    # half of a win is lost to a tie: as if it were lost whole
    assert rank_test([2.0, 3.0], [1.0, 2.0]) == pytest.approx(2 / 3)


def test_rank_test_is_wrong_as_often_as_it_says():
    generator = np.random.default_rng(1)
    draws = generator.normal(size=(2000, 8, 4))
    wrong = np.mean([rank_test(x[:3], x[3:]) < 0.1 for x in draws])
    assert 0.06 < wrong < 0.11
