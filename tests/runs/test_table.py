import io

import numpy as np
import pytest
from rich.console import Console

from rgpo.errors import RgpoError
from rgpo.runs.table import final_return, final_table, number, print_table


def rows_of(returns, **more):
    """One row per entry, ten steps apart."""
    return [
        {"update": i, "step": 10 * i, "return": value, "episodes": 1, **more}
        for i, value in enumerate(returns, start=1)
    ]


def test_final_return_weighs_episodes_of_the_last_tenth():
    rows = rows_of([1000.0] * 18 + [1.0, 5.0])  # 200 steps: the last tenth is (180, 200]
    assert final_return(rows) == 3.0
    rows[-1]["episodes"] = 3
    assert final_return(rows) == 4.0
    rows[-2]["return"], rows[-2]["episodes"] = None, 0
    assert final_return(rows) == 5.0


def test_final_return_of_runs_without_any():
    assert final_return([]) is None
    assert final_return(rows_of([None] * 3)) is None
    assert final_return([{"update": 1}]) is None
    assert final_return(rows_of([7.0] + [None] * 19)) is None  # long ago is not final
    assert final_return([{"update": 1, "step": 10, "return": 2.0}]) == 2.0  # an older run


def test_the_table_by_hand(make_run):
    paths = []
    for seed, (level, kl) in enumerate([(1.0, 0.01), (2.0, 0.03)]):
        rows = rows_of([level] * 4, kl=kl, ess=0.5, seconds=2.0)
        rows[0] |= {"kl": 5 * kl, "kl_spike": 1}
        rows[1]["kl_spike"] = 0
        rows[2]["ess"] = None
        paths.append(make_run("ppo", seed, rows=rows))
    paths.append(make_run("rgpo", 0, rows=rows_of([9.0] * 4)))
    paths.append(make_run("rgpo", 1, rows=rows_of([-99.0] * 4), status="failed"))
    ppo, rgpo = final_table(paths)
    assert (ppo.recipe, ppo.env, ppo.runs, ppo.finished) == ("ppo", "Hopper-v5", 2, 2)
    assert (ppo.returns.iqm, ppo.returns.n, ppo.improvement) == (1.5, 2, None)
    assert ppo.kl == pytest.approx((0.01 * 8 / 4 + 0.03 * 8 / 4) / 2)
    assert (ppo.kl_spike_rate, ppo.ess, ppo.seconds) == (0.5, 0.5, 8.0)
    assert (rgpo.runs, rgpo.finished) == (2, 1)
    assert (rgpo.returns.iqm, rgpo.returns.single) == (9.0, True)
    assert rgpo.improvement.probability == 1.0
    assert (rgpo.kl, rgpo.kl_spike_rate, rgpo.ess, rgpo.seconds) == (None,) * 4


def test_unfinished_runs_count_where_there_is_nothing_else(make_run):
    path = make_run("ppo", 0, rows=rows_of([4.0] * 4), status=None)
    (row,) = final_table([path])
    assert (row.runs, row.finished, row.returns.iqm) == (1, 0, 4.0)


def test_environments_are_kept_apart(make_run):
    paths = [
        make_run("ppo", 0, env="A", rows=rows_of([1.0])),
        make_run("rgpo", 0, env="B", rows=rows_of([2.0])),
    ]
    a, b = final_table(paths)
    assert (a.env, b.env, b.improvement) == ("A", "B", None)


def test_a_label_tells_arms_of_one_recipe_apart(make_run):
    rows = rows_of([1.0])
    paths = [make_run("rgpo", seed, rows=rows, label=f"rgpo k={seed}") for seed in (1, 2)]
    assert [row.recipe for row in final_table(paths)] == ["rgpo k=1", "rgpo k=2"]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(RgpoError, match="is no run directory"):
        final_table([tmp_path])


def printed(rows, width):
    console = Console(width=width, file=io.StringIO())
    print_table(rows, console)
    return console.file.getvalue()


def test_print_table(comparison, make_run, fake_rows):
    comparison.append(make_run("rgpo-gate", 3, rows=fake_rows("rgpo-gate", 3), status="failed"))
    text = printed(final_table(comparison), 120)
    ppo, gate = (line.split() for line in text.splitlines() if line.startswith((" ppo", " rgpo")))
    rows = final_table(comparison)
    assert ppo[0] == "ppo"
    assert ppo[1] == f"{rows[0].returns.iqm:,.0f}"
    assert "0.0%" in ppo
    assert gate[0] == "rgpo-gate"
    assert "3 of 4" in " ".join(gate)
    assert "…" not in printed(rows, 80)


def test_columns_that_nobody_has_are_left_out(make_run):
    text = printed(final_table([make_run("ppo", 0, rows=rows_of([1.0]))]), 120)
    assert "one run" in text
    assert "ESS" not in text
    assert "better" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1933.4, "1,933"),
        (-1933.4, "-1,933"),
        (28.84, "28.8"),
        (0.98349, "0.983"),
        (0.0084012, "0.00840"),
        (0.0000123, "1.23e-05"),
        (np.inf, "inf"),
    ],
)
def test_number(value, text):
    assert number(value) == text
