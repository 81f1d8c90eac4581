"""The control study: learning rates, strengths at equal KL, tables and sentences."""

import dataclasses
import json
import math
import os
from itertools import product

import numpy as np
import pytest

from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.studies import control
from rgpo.studies.control import STRENGTHS, TARGETS, ControlStudy
from rgpo.studies.control_cells import ControlCells
from rgpo.studies.control_report import (
    ALL,
    comparisons,
    conclusion,
    findings,
    markdown,
    sizes,
    write,
)
from rgpo.studies.jobs import RESULTS, Cell, hold_lengths


def measured(cell: Cell) -> dict:
    """KL is set by the strength; rgpo is worth 20 more than ppo at any KL, 3e-4 is best."""
    recipe, _, option = cell.arm.partition(":")
    published = {"ppo": 0.2, "rgpo": 0.01, "awr": 0.0, "spo": 0.2}[recipe]
    strength = float(option.split(",")[0].partition("=")[2]) if option else published
    kl = {"ppo": strength / 10, "rgpo": strength, "awr": 0.2, "spo": strength**3}[recipe]
    noise = np.random.default_rng([cell.seed, len(cell.arm)]).normal()
    level = {"ppo": 100.0, "rgpo": 120.0, "awr": 101.0, "spo": 100.0}[recipe]
    level *= {"Walker2d-v5": 1, "Hopper-v5": 10}[cell.task]
    loss = abs(math.log10(cell.learning_rate / 3e-4))
    found = {"final_return": level + noise - 50 * loss, "kl": kl, "kl_spike": 0.0, "failed": None}
    found["seconds"] = 1.0
    return dataclasses.asdict(cell) | found


def ended(directory, tasks, arms=("ppo", "rgpo", "awr")) -> ControlStudy:
    """A study whose every cell has been `measured`."""
    made = control.control(directory, tasks=tasks, arms=arms, seeds=5)
    with (directory / RESULTS).open("w") as file:
        for phase in (made.tuning, made.strengths, made.between, made.reported):
            file.writelines(json.dumps(measured(cell)) + "\n" for cell in phase())
            file.flush()
    return made


@pytest.fixture
def study(tmp_path) -> ControlStudy:
    return ended(tmp_path, ["Walker2d-v5"])


def test_arms_are_brought_to_the_same_kl_or_left_out(study):
    assert set(study.rates().values()) == {3e-4}
    found = study.matched()
    assert found["Walker2d-v5", 0.01, "ppo"] == "ppo:clip_low=0.1,clip_high=0.1"
    assert found["Walker2d-v5", 0.01, "rgpo"] == "rgpo"  # its published KL target
    assert not any(cell.arm == "rgpo:kl_target=0.01" for cell in study.strengths())
    assert found["Walker2d-v5", 0.03, "rgpo"] == "rgpo:kl_target=0.03"
    assert not any(arm == "awr" for _, _, arm in found)  # nothing to set
    assert study.between() == []


def test_a_target_between_two_strengths_is_tried_at_their_geometric_mean(tmp_path):
    made = control.control(tmp_path, tasks=["Walker2d-v5"], arms=["spo"])
    with (tmp_path / RESULTS).open("w") as file:
        for phase in (made.tuning, made.strengths):
            file.writelines(json.dumps(measured(cell)) + "\n" for cell in phase())
            file.flush()
    assert {(cell.arm, cell.seed) for cell in made.between()} == {  # 0.2 and 0.4: 0.008 and 0.064
        ("spo:epsilon=0.28", seed) for seed in control.TUNING_SEEDS
    }
    done = ended(tmp_path, ["Walker2d-v5"], ["spo"])
    assert done.matched()["Walker2d-v5", 0.03, "spo"] == "spo:epsilon=0.28"
    assert {r["kl"] for r in done.shown()} == {0.2**3, 0.28**3}
    assert done.planned() == {"Walker2d-v5": 0}


def test_tables_and_sentences(study):
    found = {title: rows for _, title, rows in findings(study).tables}
    rows = found["as published"]
    assert [row.arm for row in rows] == ["rgpo", "awr", "ppo"]
    assert rows[0].better.probability == 1
    assert rows[0].p == pytest.approx(2 / math.comb(10, 5))
    assert rows[0].ratio == pytest.approx(1.2, abs=0.03)
    assert rows[-1].better is None
    assert conclusion(rows) == "Better than PPO: rgpo. Not distinguishable: awr."
    assert conclusion(rows[-1:]) == "Nothing to compare."
    for target in TARGETS:
        matched = found[f"at a KL of {target:g}"]
        assert {row.arm.partition(":")[0] for row in matched} == {"ppo", "rgpo"}
        assert all(abs(math.log(row.kl / target)) < math.log(1.5) for row in matched)
    text = markdown(findings(study), "rgpo study control")
    assert "| KL per update | Walker2d-v5 |" in text
    assert "In the paper RGPO's return is 81% above PPO's." in text
    assert "at a KL of 0.03" in text
    assert (
        "- Walker2d-v5: Rank correlation of return and mean KL per update over 6 variants:" in text
    )
    assert "Walker2d-v5" in write(findings(study), "rgpo study control").read_text()


def test_all_that_was_tuned_is_told_by_the_size_of_its_updates(study):
    head, rows = sizes(study)
    assert head == ["KL per update", "Walker2d-v5"]
    cells = dict(rows)
    assert [cell.partition(" ")[2] or cell for cell in cells.values()] == [
        "–",
        "(2)",  # a KL of 0.005 of ppo and rgpo
        "(8)",  # ppo with 0.01, and 0.02 at three rates; rgpo with 0.02, and 0.01 at three
        "(4)",  # 0.04 and 0.08 of ppo, 0.03 and 0.06 of rgpo
        "(3)",  # awr at three rates
        "–",
    ]
    awr = [r["final_return"] for r in study.tuned() if r["arm"] == "awr"]
    middle = np.median([np.mean(awr[i::3]) for i in range(3)])
    assert float(cells["0.1 to 0.3"].split()[0]) == pytest.approx(middle, abs=0.05)


def test_tasks_together_are_on_one_scale_and_compared_within_tasks(tmp_path):
    study = ended(tmp_path, ["Walker2d-v5", "Hopper-v5"])
    together = {title: rows for task, title, rows in findings(study).tables if task == ALL}
    assert list(together) == list(comparisons(study))
    rgpo, *_, ppo = together["as published"]
    assert (rgpo.arm, ppo.arm) == ("rgpo", "ppo")
    assert 0 <= ppo.returns.iqm < 0.1 < 0.9 < rgpo.returns.iqm <= 1.1
    assert rgpo.better.probability == 1
    assert rgpo.p == pytest.approx(2 / math.comb(10, 5) ** 2)
    assert rgpo.ratio is None
    assert rgpo.returns.cv is None
    one = dataclasses.replace(study, tasks=("Hopper-v5",))
    assert {cell.task for cell in one.reported()} == {"Hopper-v5"}  # the other's are not its own
    assert {row.arm for row in together["at a KL of 0.01"]} == {"rgpo", "ppo"}


def test_a_run_that_diverged_at_once_scores_as_the_worst_of_its_task(study):
    path = study.directory / RESULTS
    *lines, last = path.read_text().splitlines(keepends=True)
    lost = json.loads(last) | {"final_return": None, "failed": "NaN"}
    path.write_text("".join(lines) + json.dumps(lost) + "\n")
    mine = next(r["final_return"] for r in study.shown() if r["failed"])
    others = [r["final_return"] for r in study.shown() if not r["failed"]]
    assert json.loads(last)["final_return"] > min(others)
    assert mine == min(others)


def test_every_strength_is_a_hyper_parameter_of_its_arm():
    cells = ControlCells((("CartPole-v1", control.TrainConfig(env="CartPole-v1")),))
    for arm, (names, numbers) in STRENGTHS.items():
        recipes.get(arm)
        assert list(numbers) == sorted(numbers)
        for name, number in product(names, numbers):
            cell = Cell("CartPole-v1", f"{arm}:{name}={number:g}", 0, 0, 1e-3)
            assert cells.refusal("CartPole-v1", cell.arm) is None
    assert cells.config(Cell("CartPole-v1", "trpo:max_kl=0.03", 0, 0, 1e-3)).max_kl == 0.03


@pytest.mark.parametrize(
    ("steps", "number"), [(50_000, 3), (100_000, 3), (400_000, 9), (10**7, 13)]
)
def test_what_a_kill_can_lose_does_not_grow_with_the_steps_of_a_run(monkeypatch, steps, number):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = control.TrainConfig(env="CartPole-v1", steps=steps)
    jobs = ControlCells((("CartPole-v1", config),)).jobs(
        Cell("CartPole-v1", "ppo", 0, seed, 1e-3) for seed in range(50)
    )
    sizes = [len(job) for job in jobs]
    assert (len(sizes), sum(sizes)) == (number, 50)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("runs", "sizes"), [(12, [6, 6]), (30, [15, 15]), (6, [3, 3]), (3, [3])])
def test_a_short_phase_is_spread_over_the_cores(monkeypatch, runs, sizes):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = control.TrainConfig(env="CartPole-v1", steps=50_000)
    jobs = ControlCells((("CartPole-v1", config),)).jobs(
        Cell("CartPole-v1", "ppo", 0, seed, 1e-3) for seed in range(runs)
    )
    assert [len(job) for job in jobs] == sizes


def test_the_plan_counts_runs_and_unknown_arms_are_refused(study, tmp_path):
    assert study.planned() == {"Walker2d-v5": 0}
    fresh = control.control(tmp_path / "new", tasks=["Hopper-v5"], arms=["ppo"], seeds=3)
    assert fresh.planned() == {"Hopper-v5": 2 * (3 + 4 + 2) + 3 * 3}
    assert fresh.seconds(workers=2) == 27 * 100_000 / control.STEPS_PER_SECOND / 2
    hold_lengths(study.directory, study.trains.lengths)
    shorter = control.control(study.directory, tasks=["Walker2d-v5"], arms=["ppo"], steps=10)
    with pytest.raises(RgpoError, match="have a length of 100,000, not 10"):
        shorter.run()
    with pytest.raises(RgpoError, match="unknown recipe"):
        control.control(tmp_path, arms=["pppo"])
    with pytest.raises(RgpoError, match="a study tunes the learning rates itself"):
        control.control(tmp_path, arms=["ppo:learning-rate=1e-3"])
