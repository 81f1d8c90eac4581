"""The RLHF study: plan, equal tuning, numbers with known answers, one real run, bad input."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rgpo import cli
from rgpo.errors import RgpoError
from rgpo.language.fitting import refuse_early
from rgpo.studies import rlhf_front, rlhf_study
from rgpo.studies.jobs import RESULTS, Cell, missing
from rgpo.studies.rlhf_cells import ARMS, POINTS, TUNING_SEEDS, RlhfCells, update_kl
from rgpo.studies.rlhf_front import apart, at_kl, changes, common_levels, end, rows
from rgpo.studies.rlhf_study import FINALISTS, RATES, RlhfStudy
from rgpo.studies.rlhf_study_report import Report, best_form, conclusion

SPEED = {"ppo-rlhf": 1.0, "grpo": 2.0, "kl-only": 4.0}
"""KL of an arm's first evaluation; the others follow it evenly."""


def result(cell: Cell, kls=None, gold=0.1, proxy=0.2, **changes) -> dict:
    """Gold and proxy rewards that grow evenly with the KL, from 0.5 and -0.25."""
    name, _, strength = cell.arm.partition(":")
    if kls is None:
        noise = np.random.default_rng([cell.seed, len(cell.arm)]).normal(scale=0.01)
        kls = [SPEED.get(name, 1.0) * i + noise for i in range(1, POINTS + 1)]
    points = [{"update": 0, "proxy": -0.25, "gold": 0.5, "kl": 0.0}]
    points += [
        {"update": i + 1, "proxy": -0.25 + proxy * kl, "gold": 0.5 + gold * kl, "kl": kl}
        for i, kl in enumerate(kls)
    ]
    points = [point | {"length": 10.0, "entropy": 1.0, "cut": 0.0} for point in points]
    better = strength == ARMS[name].strengths[1] and cell.learning_rate == RATES[1]
    loss = abs(np.log(cell.learning_rate / RATES[1])) - better
    found = {"final_return": 0.5 - loss, "failed": None, "points": points}
    found |= {"update_kl": 0.01, "kl_spike": 0.0, "cpu": 2.0, "seconds": 4.0}
    return dataclasses.asdict(cell) | found | changes


def write(study: RlhfStudy, cells, **changes) -> None:
    study.directory.mkdir(exist_ok=True)
    with (study.directory / RESULTS).open("a") as file:
        file.writelines(json.dumps(result(cell, **changes)) + "\n" for cell in cells)


@pytest.fixture
def study(tmp_path) -> RlhfStudy:
    """Three arms, whole."""
    made = rlhf_study.study(tmp_path / "out", arms=list(SPEED), seeds=4)
    for phase in (made.rates, made.strengths, made.finalists, made.reported):
        write(made, phase())
    return made


def test_every_arm_is_tuned_with_as_many_runs_on_seeds_that_are_not_reported(tmp_path):
    study = rlhf_study.study(tmp_path)
    tuning = []
    for phase in (study.rates, study.strengths, study.finalists):
        cells = phase()
        write(study, cells)
        tuning.append(cells)
    count = Counter(cell.arm.partition(":")[0] for cells in tuning for cell in cells)
    assert count == dict.fromkeys(ARMS, len(RATES) + 2 + FINALISTS)
    assert {c.learning_rate for c in tuning[1]} == {RATES[1]}
    assert {c.seed for c in tuning[0] + tuning[1]} == {TUNING_SEEDS[0]}
    assert {c.seed for c in tuning[2]} == {TUNING_SEEDS[1]}
    reported = study.reported()
    assert Counter(c.arm.partition(":")[0] for c in reported) == dict.fromkeys(ARMS, 5)
    assert not {c.seed for c in reported} & set(TUNING_SEEDS)


def test_the_finalist_with_the_most_gold_over_both_seeds_is_reported(study, tmp_path):
    assert study.chosen() == {arm: (ARMS[arm].strengths[1], RATES[1]) for arm in SPEED}
    assert {c.arm for c in study.reported()} == {f"{a}:{ARMS[a].strengths[1]}" for a in SPEED}
    other = rlhf_study.study(tmp_path / "other", arms=["grpo"])
    write(other, [*other.rates()])
    write(other, other.strengths())
    first, second = other.finalists()
    write(other, [first], final_return=-9.0)  # it was luck
    write(other, [second])
    assert other.chosen()["grpo"] == (second.arm.partition(":")[2], second.learning_rate)


def test_an_interrupted_study_continues_with_what_is_missing(tmp_path):
    study = rlhf_study.study(tmp_path, arms=["grpo"], seeds=3)
    assert study.planned() == {"tune": 8, "report": 3}
    assert study.seconds(1) > rlhf_study.SECONDS["base"]
    write(study, study.rates()[:3])
    assert study.planned() == {"tune": 5, "report": 3}
    assert [c.learning_rate for c in missing(study.rates(), tmp_path)] == [RATES[3]]
    write(study, study.rates()[3:])
    write(study, study.strengths())
    write(study, study.finalists())
    write(study, study.reported()[:2])
    assert study.planned() == {"tune": 0, "report": 1}
    assert [c.seed for c in missing(study.reported(), tmp_path)] == [2]


def test_rewards_are_gains_and_are_interpolated_at_a_kl():
    cell = Cell("tiny", "grpo:beta=0.05", 0, 0, 1e-4)
    run = result(cell, kls=[2.0, 6.0, 4.0], gold=0.1)
    assert end([run], "gold") == pytest.approx([0.4])
    assert end([run], "proxy") == pytest.approx([0.8])
    assert end([run], "kl") == [4.0]
    assert at_kl(run, "gold", 1.0) == pytest.approx(0.1)
    assert at_kl(run, "proxy", 5.0) == pytest.approx(1.0)  # where it is first reached
    assert at_kl(run, "gold", 6.5) is None
    slower = result(cell, kls=[0.4, 1.6])
    assert common_levels({"a": [run], "b": [slower]}) == [0.5, 1.0, 1.5]


def test_rows_conclusion_and_percentages(study):
    runs = study.runs()
    assert {arm: len(results) for arm, results in runs.items()} == dict.fromkeys(SPEED, 4)
    table = rows(runs)
    assert [row.arm for row in table] == ["kl-only", "grpo", "ppo-rlhf"]
    assert table[0].ends["kl"].iqm == pytest.approx(24, abs=0.05)
    assert table[0].ends["gold"].iqm == pytest.approx(2.4, abs=0.01)
    assert table[0].second_half["gold"].iqm == pytest.approx(1.2, abs=0.01)
    assert table[0].better["grpo"].probability == 1
    assert set(table[1].better) == {"ppo-rlhf"}
    found = changes(runs, "grpo")
    assert found["kl", "ppo-rlhf"].share == pytest.approx(1.0, abs=0.02)
    assert found["kl", "ppo-rlhf"].low > 0.9
    said = conclusion(runs)
    more = "Gold reward at the end: of 2 arms 2 (grpo, kl-only) higher than ppo-rlhf"
    assert any(sentence.startswith(more) for sentence in said)
    equal = "Gold reward at a KL of 4, which all runs reach: of 2 arms 0 higher than grpo, 0 lower"
    assert any(sentence.startswith(equal) for sentence in said)
    assert any("Over-optimisation" in s and s.endswith("in no arm.") for s in said)


def test_arms_are_apart_only_where_the_ranks_say_so():
    scores = {"base": [1, 2, 3, 4, 5], "up": [6, 7, 8, 9, 10], "down": [0, -1, -2, -3, -4]}
    scores["same"] = [1.5, 2.5, 3.5, 0, 6]
    assert apart(scores, "base") == (["up"], ["down"])
    assert apart({"base": [1.0], "up": [9.0]}, "base") == ([], [])  # one run says nothing


def test_over_optimisation_is_gold_lost_for_proxy_won():
    cells = [Cell("tiny", "grpo:beta=0.05", 0, seed, 1e-4) for seed in range(3)]
    runs = {"grpo": [result(cell, gold=-0.1, proxy=0.1) for cell in cells]}
    assert any("intervals without 0): grpo." in sentence for sentence in conclusion(runs))


def test_the_form_of_the_gate_is_the_simplest_that_is_not_worse_than_another():
    def runs(**gold):
        return {
            f"rgpo-dual-{form}+kl": [
                result(Cell("tiny", "grpo:beta=0.05", 0, seed, 1e-4), kls=[1 + seed / 100], gold=g)
                for seed in range(5)
            ]
            for form, g in gold.items()
        }

    assert best_form(runs(geometric=0.1, detached=0.2, product=0.3))[0] == "product"
    form, why = best_form(runs(geometric=0.3, detached=0.3, product=0.3))
    assert form == "geometric"
    assert "geometric and detached and product are not distinguishable" in why
    form, why = best_form(runs(geometric=0.1, detached=0.3, product=0.3))
    assert form == "detached"
    assert "less than another form: geometric." in why
    assert best_form(runs(geometric=0.1)) == (None, "")


def test_the_report_has_every_table_and_front(study):
    report = Report.of(study)
    text = report.markdown("rgpo study rlhf")
    for title in (
        "At the end",
        "On the way",
        "Gold reward at equal KL",
        "The paper's percentages",
        "Tuning",
    ):
        assert f"\n## {title}" in text
    assert "| the paper | +14.8% |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("| ppo-rlhf")]
    heads = [line.count("|") for line in text.splitlines() if line.startswith("| arm")]
    assert set(widths) <= set(heads)
    page = report.write("rgpo study rlhf").read_text()
    assert all(f"plot-{name}" in page for name in ("gold", "proxy", "over"))
    assert "1536 in all" in page


def test_the_kl_of_an_update_is_that_of_its_last_pass():
    assert update_kl([0, 0, 0.1, 0.3, 0, 0, 0.4, 0.4, 9], 2, 2) == pytest.approx([0.2, 0.4])


def test_every_trial_is_a_run_of_rlhf_that_can_be_trained(study):
    cells = RlhfCells(None, study.config, {})
    for name, arm in ARMS.items():
        for strength in arm.strengths:
            settings = cells.settings(Cell("tiny", f"{name}:{strength}", 0, 7, 3e-4))
            refuse_early(settings)
            assert (settings.beta > 0) == ("beta" in strength)
            assert (settings.seed, settings.learning_rate) == (7, 3e-4)
    assert cells.settings(Cell("tiny", "ppo-rlhf:beta=0.15", 0, 0, 1e-3)).kl_in == "reward"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A base that is smaller than the study's, and what trains from it."""
    made = rlhf_study.study(tmp_path_factory.mktemp("rlhf") / "out", updates=POINTS)
    small = {"sft_steps": 60, "pairs": 512, "reward_steps": 60, "held_out": 4, "batch": 2}
    made = replace(made, config=replace(made.config, samples=4, max_tokens=16, **small))
    return made, made.trains(lambda *_: None)


def test_a_run_is_trained_and_evaluated_from_the_base(real):
    _, trains = real
    cell = Cell("tiny", "rgpo-dual-detached:reference_sharpness=3", 0, 0, 1e-3)
    (run,) = trains([cell])
    assert [point["update"] for point in run["points"]] == list(range(POINTS + 1))
    assert run["points"][0]["kl"] == 0
    assert run["points"][-1]["kl"] > 0
    assert run["final_return"] == run["points"][-1]["gold"]
    assert run["failed"] is None
    assert 0 < run["cpu"] < run["seconds"] * 2
    tuning, again = trains([replace(cell, seed=TUNING_SEEDS[0]), cell])
    assert [point["update"] for point in tuning["points"]] == [0, POINTS]
    assert again["points"] == run["points"]  # the evaluations leave no trace in training
    json.dumps(run)


def test_a_run_that_breaks_down_is_a_result(real):
    _, trains = real
    (run,) = trains([Cell("tiny", "kl-only:beta=0.05", 0, 1, 1e30)])
    assert "not finite" in run["failed"]
    assert run["final_return"] is None
    assert rlhf_front.end([run], "gold") == [0.0]


def test_the_base_is_made_once_and_belongs_to_its_settings(real):
    study, trains = real
    told = []
    again = study.trains(lambda stage, *_: told.append(stage))
    assert told == []
    assert again == trains
    other = replace(study, config=replace(study.config, updates=12))
    with pytest.raises(RgpoError, match="holds a run with another updates"):
        other.trains(lambda *_: None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--arms", "ppo"], "unknown arm 'ppo': choose from rgpo-dual-product"),
        (["--updates", "3"], "less than the 6 evaluations"),
        (["--seeds", "101"], "--seeds must lie between 1 and 100"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, options, sentence):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "rlhf", "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_other_studies_need_no_language_libraries():
    code = "import sys, rgpo.studies.command; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
