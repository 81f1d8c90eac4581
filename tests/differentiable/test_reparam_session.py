"""Runs on disk: resumed bit for bit, evaluated as score-function runs are, drawn in the report."""

import dataclasses
import signal

import numpy as np
import pytest
import torch

from rgpo import cli
from rgpo.control.config import TrainConfig
from rgpo.differentiable import session
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.session import config_of, evaluate_run
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run

UPDATES = 6
TINY = ReparamConfig(
    num_envs=4,
    window=8,
    steps=32 * UPDATES,
    hidden=(16, 16),
    minibatches=2,
    checkpoint_every=2,
    eval_episodes=0,
    track=(),
)


def rows_of(path):
    rows = Run.open(path).metrics()
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def stop_after(updates):
    def progress(done, *_):
        if done == updates:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algo": "reppo", "set": ("kl_target=0.01",)},
        {"entropy_coefficient": 0.1, "entropy_target": -0.5, "soft_rewards": True},
    ],
    ids=["plain", "reppo, adaptive KL", "maximum entropy"],
)
def test_resumed_runs_are_the_uninterrupted_ones_bit_for_bit(tmp_path, changes):
    configs = [dataclasses.replace(TINY, seed=seed, **changes) for seed in (3, 4)]
    wholes, parts = ([tmp_path / f"{kind}{run}" for run in range(2)] for kind in ("whole", "part"))
    assert session.start(configs, wholes) == ["finished"] * 2
    assert session.start(configs, parts, stop_after(3)) == ["interrupted"] * 2
    assert session.resume(parts) == ["finished"] * 2
    for whole, part in zip(wholes, parts, strict=True):
        assert rows_of(whole) == rows_of(part)
        first, second = (checkpoint.newest(Run.open(p).checkpoints)[0] for p in (whole, part))
        assert first.update == second.update == UPDATES
        assert first.state == second.state
        assert first.tensors.keys() == second.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), name
    assert rows_of(wholes[0]) != rows_of(wholes[1])
    with pytest.raises(RgpoError, match="nothing to resume"):
        session.resume(wholes)


def test_a_finished_run_is_evaluated_on_the_states_of_the_gymnasium_view(tmp_path):
    config = dataclasses.replace(TINY, eval_episodes=2)
    session.start([config], [tmp_path / "run"])
    run = Run.open(tmp_path / "run")
    assert config_of(run) == config
    returns = run.status["result"]["eval_returns"]
    np.testing.assert_array_equal(evaluate_run(run.path, episodes=2).returns, returns)
    assert run.config["label"] == "reparam-ppo x5 reparam-mask"


def test_a_task_of_ones_own_is_trained_and_evaluated(tmp_path):
    config = dataclasses.replace(TINY, env="toy_tasks:Mortal", eval_episodes=1)
    session.start([config], [tmp_path / "run"])
    (length,) = evaluate_run(tmp_path / "run", episodes=1).lengths
    assert 1 <= length <= 5


def test_the_command_line_trains_evaluates_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def rgpo(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    size = ["--num-envs", "4", "--eval-episodes", "0", "--track"]
    rgpo("train", "--algo", "reparam-ppo", "--window", 8, "--steps", 96, "--out", "a", *size)
    rgpo("train", "--algo=reppo", "--window", 8, "--steps", 96, "--out", "b", *size)
    small = ["--rollout-steps", 16, "--minibatch-size", 32, "--steps", 64]
    rgpo("train", "--env", "rgpo/Pendulum", "--out", "c", *small, *size)
    assert "over 1 episodes" in rgpo("eval", "a", "--episodes", 1)
    out = rgpo("report", "a", "b", "c")
    assert "reppo x5 reparam-mask" in out
    page = (tmp_path / "report.html").read_text()
    assert "Pathwise gradients" in page
    assert "score function" in page
    helped = rgpo("train", "--algo", "reparam-ppo", "--help")
    assert "--window" in helped
    assert "--target-keep" in helped
    assert "--algo {score-function,reparam-ppo,reppo}" in rgpo("train", "--help")


def test_the_score_function_trains_on_the_same_task(tmp_path):
    from rgpo.control import session as control

    config = TrainConfig(
        env="rgpo/LQR", num_envs=2, rollout_steps=16, minibatch_size=32, steps=64, track=()
    )
    assert control.start([config], [tmp_path / "run"]) == ["finished"]
