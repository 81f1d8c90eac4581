"""The staleness study, small but real: phases, selection, tables, sentences, report."""

import dataclasses
import json

import numpy as np
import pytest

from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.runs.statistics import discoveries, rank_test
from rgpo.studies import staleness
from rgpo.studies.control_cells import ControlCells
from rgpo.studies.jobs import RESULTS, Cell, read_results
from rgpo.studies.staleness import FIRST_SEEDS, LEADER_SEEDS, TUNING_SEEDS, Study
from rgpo.studies.staleness_page import write
from rgpo.studies.staleness_report import (
    caveats,
    conclusion,
    contrasts,
    findings,
    leading,
    markdown,
    places,
    rows,
    tuning_table,
)
from rgpo.studies.tuning import RATES, judged


class Known:
    """Trains nothing: scores follow from the cell, best at 1e-3 fresh and 1e-4 old."""

    seconds_per_run = 1.0

    def refusal(self, task, arm):
        return f"no reference model on {task}" if arm == "rgpo-dual-detached" else None

    def jobs(self, cells):
        return [[cell] for cell in cells]

    def __call__(self, cells):
        return [dataclasses.asdict(cell) | self.measured(cell) for cell in cells]

    def measured(self, cell):
        quality = {"ppo": 100.0, "rgpo": 90.0, "spo": 150.0}.get(cell.arm, 50.0)
        best = 1e-3 if cell.staleness < 4 else 1e-4
        loss = 40 * abs(np.log10(cell.learning_rate / best))
        noise = np.random.default_rng(cell.seed).normal()
        return {
            "final_return": quality - loss - 2 * cell.staleness + noise,
            "failed": None,
            "weight_mean": 1.0,
            "kl_spike": 0.0,
            "kl_behavior": quality / 1e4,
        }


def study(directory, arms=("ppo", "rgpo", "spo", "rgpo-dual-detached")) -> Study:
    return staleness.make("control", directory, Known(), ("A", "B"), tuple(arms[:3]))


def finished(directory, **arms) -> Study:
    done = study(directory, **arms)
    trains = done.trains
    with (directory / RESULTS).open("w") as file:
        for phase in (
            done.tuning,
            lambda: done.reported(done.arms, FIRST_SEEDS),
            lambda: done.reported(done.leaders(), LEADER_SEEDS),
        ):
            file.writelines(json.dumps(r) + "\n" for r in trains(phase()))
            file.flush()
    return done


def test_learning_rates_are_those_that_win_on_the_tuning_seeds(tmp_path):
    rates = finished(tmp_path).chosen_rates()
    assert rates["A", "ppo", 0] == 1e-3
    assert rates["A", "ppo", 8] == 1e-4


def test_ages_get_the_rate_tuned_at_the_nearer_age(tmp_path):
    done = finished(tmp_path)
    assert staleness.TUNING_AGES[done.workload] == (0, 8)
    assert [done.tuned_at(age) for age in done.ages] == [0, 0, 0, 0, 8, 8]
    reported = {(c.staleness, c.learning_rate) for c in done.reported(["ppo"], [0])}
    assert reported == {(a, 1e-4 if a >= 8 else 1e-3) for a in done.ages}


def test_tables_compare_with_both_rivals_and_sentences_with_the_workloads_own(tmp_path):
    done = finished(tmp_path, arms=("ppo", "grpo", "spo"))
    table = {row.arm: row for row in rows(done, "A")}
    assert {arm: list(row.fresh) for arm, row in table.items()} == {
        "spo": ["ppo", "grpo"],
        "ppo": ["grpo"],
        "grpo": ["ppo"],
    }
    assert table["grpo"].stale["ppo"].chance.probability == 0
    assert table["ppo"].stale["grpo"].chance.probability == 1
    text = markdown(findings(done), "rgpo study staleness")
    assert "| P fresh, ppo | P fresh, grpo | P old, ppo | P old, grpo |" in text
    assert "of 2 recipes 1 score higher (spo) than ppo, 1 lower (grpo)" in text


def test_tables_and_sentences_say_what_the_scores_are(tmp_path):
    done = finished(tmp_path)
    table = rows(done, "A")
    assert [row.arm for row in table] == ["spo", "ppo", "rgpo"]
    assert table[0].fresh["ppo"].chance.probability == 1
    assert table[0].fresh["ppo"].p == pytest.approx(
        2 / 252
    )  # of 5 against 5 runs, all orders alike
    assert table[1].fresh == {}
    assert table[2].stale["ppo"].chance.probability == 0
    assert {row.seeds for row in table} == {5}
    fresh, old, ranks = conclusion(table, "A")
    assert "of 2 recipes 1 score higher (spo) than ppo, 1 lower (rgpo); 0 are not" in fresh
    assert "1 lower" in old
    assert "rgpo 3" in ranks
    text = markdown(findings(done), "rgpo study staleness")
    assert "over 3 recipes: 1.00 at age 0" in text
    assert "1.00 at age 16." in text
    assert "0.0150 → 0.0150 |" in text
    assert "| spo | 5 | 0.001 / 0.0001 | 1" in text
    assert "rgpo study staleness" in write(findings(done), "rgpo study staleness").read_text()


def test_all_tasks_together_on_one_scale(tmp_path):
    done = finished(tmp_path)
    found = places(done)
    assert [p.arm for p in found] == ["spo", "ppo", "rgpo"]
    best, middle, worst = (p.fresh.mean for p in found)
    assert best == pytest.approx(1, abs=1e-12)  # the highest mean of all, in both tasks alike
    span = 150 - (90 - 2 * 4 - 40)  # the lowest: rgpo at age 4, with the rate tuned at age 0
    assert best - middle == pytest.approx(50 / span, rel=1e-6)
    assert best - worst == pytest.approx(60 / span, rel=1e-6)
    fresh, old = leading(found, 2)
    assert fresh.startswith("Highest of 3 recipes on fresh data: spo 0.998 [")
    assert "on old data: spo" in old
    grid, rates, correlation = caveats(done)
    assert grid == "6 of 12 tuned learning rates are the highest of the grid."
    assert rates.startswith("0.0001, 0.0003, 0.001 were chosen 0, 0, 6 times at age 0; 6, 0, 0 ")
    assert "correlate by 1, 1 (A, B)" in correlation  # Known's noise is the seed's at every age
    head, lines = tuning_table(done, "A")
    assert head == ["recipe", *(f"age {a}, {r:g}" for a in (0, 8) for r in RATES)]
    assert [line[0] for line in lines] == sorted(done.arms)
    for line in lines:  # the best of an age is the rate that was chosen there
        for age, best in ((0, 1e-3), (8, 1e-4)):
            scores = dict(zip(head[1:], map(float, line[1:]), strict=True))
            mine = {r: scores[f"age {age}, {r:g}"] for r in RATES}
            assert max(mine, key=mine.__getitem__) == best
    text = markdown(findings(done), "")
    assert "## A: tuning" in text
    assert "| spo | 0.998 [" in text
    assert r"| mean \|w\|/\|A\| |" in text


def test_a_run_that_diverged_without_a_score_is_the_worst_of_its_task(tmp_path):
    done = finished(tmp_path)
    results = read_results(tmp_path)
    index = next(i for i, r in enumerate(results) if (r["arm"], r["seed"]) == ("spo", 0))
    lost = results[index] | {"final_return": None, "failed": "it diverged in update 1"}
    results[index] = lost
    (tmp_path / RESULTS).write_text("".join(json.dumps(r) + "\n" for r in results))
    (spo,) = (row for row in rows(done, lost["task"]) if row.arm == "spo")
    assert spo.failed == 1
    reported = done.results((*FIRST_SEEDS, *LEADER_SEEDS))
    of_task = [r["final_return"] for r in reported if r["task"] == lost["task"]]
    worst = min(x for x in of_task if x is not None)
    assert [r["final_return"] for r in judged(reported) if r["failed"]] == [worst]


def test_tuning_seeds_are_never_reported():
    for seeds in TUNING_SEEDS.values():
        assert not set(seeds) & {*FIRST_SEEDS, *LEADER_SEEDS}


def test_the_plan_counts_what_is_missing(tmp_path):
    fresh = study(tmp_path)
    pairs = 2 * 3
    assert fresh.planned()["tune"] == pairs * 2 * 2 * 3
    assert fresh.planned()["report"] == pairs * 6 * 5
    done = finished(tmp_path)
    assert done.planned() == {"tune": 0, "report": 0}


def test_the_control_workload_really_trains(tmp_path):
    small = staleness.control(tmp_path, tasks=["CartPole-v1"], arms=["rgpo", "bpo"], steps=2048)
    cells = [Cell("CartPole-v1", arm, 4, 0, 1e-3) for arm in small.arms]
    jobs = small.trains.jobs(cells)
    assert sorted(len(job) for job in jobs) == [1, 1]  # one learner each
    for job in jobs:
        (result,) = small.trains(job)
        assert result["failed"] is None
        assert 5 < result["final_return"] < 500
        assert result["kl_behavior"] > result["kl"] > 0
        assert result["learner"] == ("plain" if result["arm"] == "bpo" else "fast")
    assert read_results(tmp_path) == []


def test_every_recipe_is_trained_or_refused_with_a_reason():
    cells = ControlCells((("CartPole-v1", staleness.CONTROL["CartPole-v1"]),))
    refused = {name: cells.refusal("CartPole-v1", name) for name in recipes.names()}
    trained = [name for name, reason in refused.items() if reason is None]
    assert {"ppo", "rgpo", "gipo", "trpo"} <= set(trained)
    assert all(name in reason for name, reason in refused.items() if reason is not None)


def test_an_arm_that_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(RgpoError, match="a study tunes the learning rates itself"):
        staleness.control(tmp_path, tasks=["CartPole-v1"], arms=["ppo:learning_rate=1e-3"])
    with pytest.raises(RgpoError, match="no reference model"):
        staleness.control(tmp_path, tasks=["CartPole-v1"], arms=["ppo", "rgpo-dual-detached"])


def test_noise_is_no_discovery():
    """59 recipes as good as the baseline: one test each would call several of them different."""
    generator = np.random.default_rng(1)
    baseline, *others = generator.normal(size=(60, 5, 5))
    compared = {str(i): rank_test(o[:3], baseline) for i, o in enumerate(others)}
    assert sum(p < 0.05 for p in compared.values()) > 1
    assert discoveries(compared) == []
    better = rank_test(others[0] + 3, baseline)
    assert discoveries(compared | {"better": better}) == ["better"]


def test_contrasts_tell_one_difference_each(tmp_path):
    arms = ("ppo", "rgpo", "rgpo-gate", "rgpo-signed", "ppo-kl", "spo")
    done = staleness.make("control", tmp_path, Known(), ("A",), arms)
    with (tmp_path / RESULTS).open("w") as file:
        for phase in (done.tuning, lambda: done.reported(done.arms, FIRST_SEEDS)):
            file.writelines(json.dumps(r) + "\n" for r in done.trains(phase()))
            file.flush()
    signed, penalty, gate = contrasts(done, "A")
    assert "rgpo-signed scores higher than rgpo-gate with" in signed
    assert "rgpo scores higher than rgpo-gate with 100%" in penalty
    assert "(p = 0.1)" in penalty
    assert "rgpo scores higher than ppo-kl with 100%" in gate
    assert set(done.leaders()) >= {"rgpo-signed", "rgpo-gate", "ppo-kl", "ppo"}


def test_leaders_are_the_best_on_fresh_and_the_best_on_old_data(tmp_path, monkeypatch):
    monkeypatch.setattr(staleness, "LEADERS", 1)
    quality = {"bapo": (100, 0), "dro": (0, 100), "sapo": (90, 90), "ppo": (0, 0)}
    done = staleness.make("control", tmp_path, Known(), ("A",), tuple(quality))
    first = [Cell("A", arm, age, 0, 1e-3) for arm in quality for age in done.ages]
    scores = [{"final_return": quality[c.arm][c.staleness > 0], "failed": None} for c in first]
    lines = [dataclasses.asdict(c) | s for c, s in zip(first, scores, strict=True)]
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert done.leaders() == ["bapo", "dro", "ppo"]
