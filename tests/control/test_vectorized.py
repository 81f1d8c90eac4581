"""A task's own batch: the same numbers as its environments one by one, each on its own."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from rgpo.control.config import TrainConfig
from rgpo.control.environments import make_environments
from rgpo.control.train import Trainer
from rgpo.differentiable.tasks import TASKS
from rgpo.errors import RgpoError

ENDING = "rgpo/Quadrotor"
"""Its episodes end by termination, at different times."""


def actions_for(batch, steps):
    """One action stream per seed (T, E, A), some of them out of bounds."""
    size = (steps, *batch.action_space.shape)
    streams = [np.random.default_rng(seed).uniform(-1.5, 1.5, size) for seed in batch.seeds]
    return np.stack(streams, 1).astype(np.float32)


def arrays(step):
    names = ("reward", "terminated", "truncated", "valid")
    return {name: getattr(step, name) for name in names} | step.observation


def roll(batch, actions):
    """What all steps gave, one array (T, E, ...) per name."""
    steps = [arrays(batch.step_all(action)) for action in actions]
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def assert_equal(mine, theirs, where=...):
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array[:, where], theirs[name], err_msg=name, strict=True)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_as_gymnasium_one_by_one_bit_for_bit(name):
    ours = make_environments(name, [5, 6, 7])
    theirs = make_environments(name, [5, 6, 7], backend="gymnasium")
    assert (ours.backend, theirs.backend) == ("vector", "gymnasium")
    np.testing.assert_array_equal(ours.reset()["vector"], theirs.reset()["vector"], strict=True)
    actions = actions_for(ours, 210)
    found = roll(ours, actions)
    assert_equal(found, roll(theirs, actions))
    assert (~found["valid"]).sum() >= 3
    ends = "terminated" if name in (ENDING, "rgpo/Hopper") else "truncated"
    assert found[ends].any()


@pytest.mark.parametrize("name", TASKS)
def test_an_environment_depends_on_its_seed_alone(name):
    many, few = make_environments(name, [9, 3, 17, 5, 8]), make_environments(name, [17, 3])
    first = many.reset()["vector"]
    np.testing.assert_array_equal(first[[2, 1]], few.reset()["vector"])
    assert len(np.unique(first, axis=0)) == 5
    found = roll(many, actions_for(many, 160))
    assert_equal(found, roll(few, actions_for(few, 160)), [2, 1])
    np.testing.assert_array_equal(many.reset()["vector"], first)  # starts over from its seeds


def test_a_state_continues_bit_for_bit_also_without_its_neighbours():
    batch = make_environments(ENDING, [1, 2, 3])
    batch.reset()
    actions = actions_for(batch, 120)
    while not batch._pending.any():  # taken where the next call resets
        batch.step(actions[0])
    state = json.loads(json.dumps(batch.state(), allow_nan=False))
    assert batch.exact_state
    expected = roll(batch, actions)
    assert (~expected["valid"]).sum() > 3
    batch.restore(state)
    assert_equal(roll(batch, actions), expected)
    alone = make_environments(ENDING, [0])
    alone.restore({k: v[2:] if isinstance(v, list) else v for k, v in state.items()})
    assert_equal(expected, roll(alone, actions[:, 2:]), [2])
    with pytest.raises(RgpoError, match="3 x rgpo/Quadrotor, not of 1 x rgpo/Quadrotor"):
        alone.restore(state)


def test_numbers_that_are_not_finite_stay_where_they_are():
    batch = make_environments("rgpo/LQR", [0, 1, 2])
    alone = make_environments("rgpo/LQR", [2])
    batch.reset(), alone.reset()
    actions = actions_for(batch, 250)
    actions[3, 1] = np.nan
    found = roll(batch, actions)
    assert set(batch.failures) == {1}
    assert "NaN or infinite reward" in str(batch.failures[1])
    assert_equal(found, roll(alone, actions[:, 2:]), [2])
    assert not found["valid"][3:, 1].any()
    for array in found.values():
        assert np.isfinite(array).all()
    state = json.loads(json.dumps(batch.state(), allow_nan=False))
    assert [one is None for one in state["environments"]] == [False, True, False]


def test_what_is_no_batch_of_independent_environments_is_refused():
    with pytest.raises(RgpoError, match=r"CartPole-v1 registers no batch .*: use backend auto"):
        make_environments("CartPole-v1", [0], backend="vector")
    with pytest.raises(RgpoError, match="did you mean"):
        make_environments("Hoper-v5", [0], backend="vector")
    with pytest.raises(RgpoError, match=r"could not be made .*wings"):
        make_environments(ENDING, [0], backend="vector", wings=2)


def test_a_computation_that_raises_fails_the_batch_with_a_sentence():
    batch = make_environments("rgpo/LQR", [0, 1])
    batch.reset()
    with pytest.raises(ValueError, match="got 3"):
        batch.step(np.zeros((3, 2), np.float32))
    with pytest.raises(RgpoError, match=r"rgpo/LQR raised .*, or use backend gymnasium"):
        batch.step(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("runs", [1, 2])
def test_control_trains_on_it_without_knowing_it(runs):
    """Only the task's name brings the differentiable tasks in, and the rows are Gymnasium's."""
    base = TrainConfig(env=ENDING, num_envs=2, rollout_steps=32, epochs=2, steps=64 * 6, track=())
    configs = [dataclasses.replace(base, seed=seed) for seed in range(runs)]
    ours = Trainer(configs)
    theirs = Trainer([dataclasses.replace(c, backend="gymnasium") for c in configs])
    assert ours.environments.backend == "vector"
    for _ in range(6):
        for mine, own in zip(ours.step(), theirs.step(), strict=True):
            for key in mine.keys() - {k for k in mine if k.startswith("seconds")}:
                assert mine[key] == own[key], key
    code = "import sys, rgpo.control.session; print(any('rgpo.differ' in m for m in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout.strip() == b"False"
