"""Many runs as one computation: each is what it would be alone."""

import dataclasses

import pytest
import torch

from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.train import ReparamTrainer
from rgpo.errors import RgpoError

UPDATES = 20
TINY = ReparamConfig(
    num_envs=6,
    window=12,
    steps=6 * 12 * UPDATES,
    hidden=(16, 16),
    dtype="float64",
    track=(),
)
ARMS = (
    {"seed": 1},
    {"seed": 2, "learning_rate": 0.02, "recipe": "importance", "set": ("kl_coefficient=0",)},
    {"seed": 3, "recipe": "rgpo-gate", "set": ("kl_coefficient=0.3", "kl_target=0.01")},
    {"seed": 4, "target_kl": 0.002, "critic_learning_rate": 1e-3},
)
"""Runs that differ in everything in which they may."""


def arms(**changes) -> list[ReparamConfig]:
    return [dataclasses.replace(TINY, **changes, **arm) for arm in ARMS]


def numbers(row):
    return {k: v for k, v in row.items() if not k.startswith("seconds") and v is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"env": "toy_tasks:Mortal", "minibatches": 3},
        {"env": "rgpo/Quadrotor", "state_dependent_std": True},
        {
            "env": "rgpo/Cartpole",
            "entropy_coefficient": 0.1,
            "entropy_target": -0.5,
            "soft_rewards": True,
        },
        {"env": "toy_tasks:Mortal", "algo": "reppo", "minibatches": 2},
    ],
    ids=["mortal", "quadrotor", "maximum entropy", "reppo"],
)
def test_a_run_of_a_batch_is_the_run_alone(changes):
    """Random numbers exactly, parameters and metrics to 1e-9, over 20 updates."""
    configs = arms(**changes)
    together = ReparamTrainer(configs)
    alone = [ReparamTrainer([config]) for config in configs]
    for _ in range(UPDATES):
        rows = together.step()
        for row, one in zip(rows, alone, strict=True):
            (expected,) = one.step()
            assert numbers(row) == pytest.approx(numbers(expected), rel=1e-6, abs=1e-9, nan_ok=True)
    for run, one in enumerate(alone):
        for mine, other in (
            (together.learner.generators, one.learner.generators),
            (together.environments.generators, one.environments.generators),
        ):
            assert torch.equal(mine[run].get_state(), other[0].get_state())
        for name in ("actor", "critics", "targets"):
            rows, expected = (getattr(t.learner, name).rows for t in (together, one))
            torch.testing.assert_close(rows[run], expected[0], rtol=1e-9, atol=1e-9)
        penalty = one.penalties[0]
        assert together.penalties[run] == penalty
    policies = together.learner.actor.rows
    assert all(not torch.allclose(policies[0], other) for other in policies[1:])


@pytest.mark.parametrize("what", ["policy", "environments"])
def test_a_run_that_diverges_is_set_aside_and_never_reaches_another(what):
    configs = [dataclasses.replace(TINY, env="rgpo/Pendulum", seed=seed) for seed in range(3)]
    together, alone = ReparamTrainer(configs), ReparamTrainer(configs[2:])
    if what == "policy":
        together.learner.actor.rows[1] = torch.nan
    else:
        together.environments.state[TINY.num_envs : 2 * TINY.num_envs] = torch.inf
    for _ in range(4):
        *_, row = together.step()
        assert numbers(row) == pytest.approx(numbers(alone.step()[0]), rel=1e-9, nan_ok=True)
    assert list(together.failed) == [1]
    assert "not finite" in together.failed[1]


def test_environments_of_one_run_that_go_wrong_are_its_own_concern():
    configs = [dataclasses.replace(TINY, env="rgpo/Pendulum", seed=seed) for seed in range(2)]
    together, alone = ReparamTrainer(configs), ReparamTrainer(configs[1:])
    together.environments.state[2] = torch.nan
    with pytest.warns(UserWarning, match="not finite in environment 2, step 0"):
        broken, row = together.step()
    assert broken["nonfinite_environments"] == 1
    assert row["nonfinite_environments"] == 0
    assert numbers(row) == pytest.approx(numbers(alone.step()[0]), rel=1e-9, nan_ok=True)
    again, _ = together.step()
    assert again["nonfinite_environments"] == 0
    assert not together.failed
    assert torch.isfinite(together.learner.actor.rows).all()


def test_runs_that_do_not_fit_together_are_refused():
    configs = [TINY, dataclasses.replace(TINY, epochs=2)]
    with pytest.raises(RgpoError, match="must share epochs"):
        ReparamTrainer(configs)
