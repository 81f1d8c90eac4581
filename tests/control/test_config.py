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
