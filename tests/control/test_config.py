"""What a configuration says about itself: growing numbers of environments."""

import dataclasses

import numpy as np
import pytest

from rgpo.control.config import TrainConfig
from rgpo.control.train import Trainer
from rgpo.errors import RgpoError

TINY = TrainConfig(
    env="CartPole-v1", num_envs=2, rollout_steps=16, minibatch_size=16, backend="gymnasium"
)


def test_a_factor_of_environments_keeps_the_inner_loop():
    """Four times the data are four times the optimiser steps of the same size and rate."""
    taken = {}
    for factor in (1, 4):
        config = dataclasses.replace(TINY, env_factor=factor)
        assert config.warnings() == []
        trainer = Trainer([config])
        assert len(trainer.environments.seeds) == 2 * factor
        (row,) = trainer.step()
        trainer.environments.close()
        taken[factor] = row["optimizer_steps"], row["learning_rate"], row["step"]
    np.testing.assert_allclose(taken[4], np.array(taken[1]) * [4, 1, 4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"minibatch_size": 512}, "64 environments together with minibatch_size 512"),
        ({"learning_rate": 1e-3, "epochs": 4}, "epochs 4 and learning_rate 0.001"),
    ],
)
def test_another_inner_loop_for_more_environments_is_warned_of(change, words):
    (sentence,) = TrainConfig(num_envs=64, **change).warnings()
    assert words in sentence
    assert "--env-factor" in sentence
    assert TrainConfig(num_envs=64).warnings() == []
    assert TrainConfig(num_envs=8, **change).warnings() == []
    assert TrainConfig(num_envs=8, env_factor=8, **change).warnings() == []


def test_no_environment_is_refused():
    with pytest.raises(RgpoError, match="env_factor must be at least 1"):
        TrainConfig(env_factor=0)


def test_what_is_set_may_be_a_field_in_which_runs_that_train_together_may_differ():
    options = ("sharpness=4", "learning-rate=1e-3", "target_kl=none", "max_kl=0.02")
    config = dataclasses.replace(TINY, recipe="rgpo", set=options, target_kl=0.1)
    assert (config.learning_rate, config.target_kl, config.max_kl) == (1e-3, None, 0.02)
    assert config.resolve().hyper_parameters()["sharpness"] == 4
    assert config.label == "rgpo sharpness=4 learning-rate=1e-3 target_kl=none max_kl=0.02"
    assert TrainConfig.from_json(dataclasses.asdict(config)) == config


def test_runs_with_rates_of_their_own_are_one_computation():
    arms = [("learning_rate=1e-3",), ("learning_rate=1e-4", "clip_low=0.1"), ()]
    trainer = Trainer([dataclasses.replace(TINY, recipe="ppo", set=arm) for arm in arms])
    rows = trainer.step()
    trainer.environments.close()
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e-4, 3e-4]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("learning_rate=fast", "learning_rate must be a number, got fast"),
        ("max_kl=none", "max_kl must be a number, got None"),
        ("learning_rate=-1", "learning_rate must be positive, got -1"),
        ("learning_rate", "takes name=value, got 'learning_rate'"),
    ],
)
def test_a_field_that_is_set_must_be_a_number_that_makes_sense(option, words):
    with pytest.raises(RgpoError, match=words):
        dataclasses.replace(TINY, set=(option,))
