"""The study of differentiable tasks: its arms, its statistics, and a tiny one from end to end."""

import pytest

from rgpo import cli
from rgpo.differentiable.config import ReparamConfig
from rgpo.errors import RgpoError
from rgpo.studies import differentiable as study
from rgpo.studies.jobs import Cell, read_results


def result(arm, seed, steps, task="rgpo/Pendulum"):
    return {
        **vars(Cell(task, arm, 0, seed, 3e-4 if arm in study.SCORE_FUNCTION else 5e-3)),
        "status": "finished",
        "final_return": -150.0 - seed,
        "steps": steps,
        "seconds_to": None if steps is None else steps / 1e4,
        "seconds": 10.0,
        "kl": 0.01,
        "ess": 0.9,
        "ratio_kept": None,
    }


def write(directory, results):
    import json

    directory.mkdir(exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))


def test_every_arm_is_a_run_that_can_be_made():
    names = study.arms()
    assert len(names) == len(set(names)) == 1 + 3 * 5 * 2 + 2
    configs = {
        name: study.config_of(Cell("rgpo/Cartpole", name, 0, 3, 1e-3), 640) for name in names
    }
    assert all(config.resolve() is not None for config in configs.values())
    assert len({config.label for config in configs.values()}) == len(names)
    assert configs["shac"].epochs == 1
    assert configs["10 narrow mask"].resolve().kl is None
    penalty = configs["10 gipo kl"].resolve().kl
    assert penalty is not None
    assert penalty.coefficient == study.KL
    assert isinstance(configs["10 gate"], ReparamConfig)
    assert configs["ppo"].steps == 3 * configs["shac"].steps
    assert study.STEPS.keys() == study.THRESHOLDS.keys()
    pairs = [pair for pairs in study.CONTRASTS.values() for pair in pairs]
    assert {arm for pair in pairs for arm in pair} <= set(names)


def test_a_return_is_reached_when_the_newest_episodes_have_it():
    rows = [{"return": None, "episodes": 0}]
    rows += [{"return": -300.0, "episodes": 40}, {"return": -100.0, "episodes": 16}]
    rows += [{"return": -90.0, "episodes": 16}, {"return": -500.0, "episodes": 99}]
    assert study.reached_at(rows, -200.0) == 2  # 16 at -300 and 16 at -100
    assert study.reached_at(rows, -199.0) == 3
    assert study.reached_at(rows, 0.0) is None
    assert study.reached_at([{"return": 9.0, "episodes": 31}], 0.0) is None


def test_table_contrasts_and_what_is_left_to_do(tmp_path):
    names = ("5 mask kl", "shac", "ppo")
    small = study.Differentiable(tmp_path, ("rgpo/Pendulum",), names, seeds=4, steps=100_000)
    assert len(small.todo()) == 12
    before = small.seconds(2)
    results = [result("5 mask kl", s, 20_000 + s) for s in range(4)]
    results += [result("shac", s, None if s else 60_000) for s in range(4)]
    write(tmp_path, results)
    assert len(small.todo()) == 4
    assert small.seconds(2) < before
    header, reuse, shac = study.table(small, "rgpo/Pendulum")
    assert header[:3] == ["arm", "reached", "steps, median"]
    assert reuse[:3] == ["5 mask kl", "4 of 4", "20,002"]
    assert shac[1:3] == ["1 of 4", "> 100,000"]
    ((sooner, higher),) = study.contrasts(small, small.tasks).values()
    assert sooner.probability == 1
    assert higher.probability == 0.5
    (sentence,) = study.sentences(small)
    assert "sooner yes: 100% (100% to 100%), ends higher ?: 50%" in sentence
    assert "| 5 mask kl | 4 of 4 |" in study.markdown(small, "rgpo study differentiable")


def test_names_that_the_study_does_not_have_are_refused(tmp_path):
    with pytest.raises(RgpoError, match="no task of this study"):
        study.Differentiable(tmp_path, ("rgpo/Hopper",))
    with pytest.raises(RgpoError, match="no arm of this study"):
        study.Differentiable(tmp_path, arms=("5 mask lk",))


def test_a_tiny_study_from_the_command_line_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    size = "--tasks rgpo/Pendulum --seeds 2 --steps 1024 --out out --workers 1 --arms shac ppo"
    for todo in ("4 runs to go", "0 runs to go"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", "differentiable", *size.split()])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        assert todo in out
    assert [r["status"] for r in read_results(tmp_path / "out")] == ["finished"] * 4
    assert len({r["final_return"] for r in read_results(tmp_path / "out")}) == 4
    assert "0 of 2" in (tmp_path / "out" / "tables.md").read_text()


def test_runs_that_were_stopped_give_no_result(tmp_path, monkeypatch):
    def stopped(configs, _):
        return ["interrupted"] * len(configs)

    monkeypatch.setattr(study.reparam_session, "start", stopped)
    cells = [Cell("rgpo/Pendulum", "shac", 0, seed, 5e-3) for seed in range(2)]
    with pytest.raises(RgpoError, match="shac on rgpo/Pendulum was stopped"):
        study.train(cells, directory=tmp_path, steps=512)
