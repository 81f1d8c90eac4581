"""A restored environment continues bit for bit, in the same process and in a new one."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import toy_environments

from rgpo.control import snapshot
from rgpo.control.environments import make_environments
from rgpo.errors import RgpoError

toy_environments.register()

# Time limits so that episodes end inside and, for Pendulum, exactly where the state is taken.
TASKS = {
    "CartPole-v1": {},
    "Pendulum-v1": {"max_episode_steps": 60},
    "MountainCarContinuous-v0": {"max_episode_steps": 25},
    "Hopper-v5": {"max_episode_steps": 40},
    "HalfCheetah-v5": {"max_episode_steps": 25},
    "Ant-v5": {"max_episode_steps": 25},  # reads derived arrays before it steps
    "Blackjack-v1": {},  # episodes of random length, tuples, lists
}
STEPS = 60


def make(env_id):
    return make_environments(env_id, [7, 8], backend="gymnasium", **TASKS[env_id])


def play(batch, seed):
    """All that 60 steps of random actions return, as one array per name."""
    rng = np.random.default_rng(seed)
    space = batch.action_space
    steps = []
    for _ in range(STEPS):
        if isinstance(space, gym.spaces.Discrete):
            action = rng.integers(space.n, size=2)
        else:
            action = rng.uniform(space.low, space.high, (2, *space.shape)).astype(np.float32)
        steps.append(batch.step(action))
    names = ("reward", "terminated", "truncated", "valid")
    arrays = {name: np.stack([getattr(step, name) for step in steps]) for name in names}
    return arrays | {"vector": np.stack([step.observation["vector"] for step in steps])}


def continue_all(states_path, results_path):
    """What the new process does: restore every task into fresh environments and play on."""
    results = {}
    for env_id, state in json.loads(Path(states_path).read_text()).items():
        batch = make(env_id)
        batch.restore(state)
        results |= {f"{env_id} {name}": array for name, array in play(batch, 1).items()}
    np.savez(results_path, **results)


def test_continues_bit_for_bit_in_a_new_process(tmp_path):
    states, expected = {}, {}
    for env_id in TASKS:
        batch = make(env_id)
        batch.reset()
        before = play(batch, 0)
        assert before["valid"].all() == (env_id == "Pendulum-v1")  # episodes ended before ...
        states[env_id] = batch.state()
        after = play(batch, 1)
        assert not after["valid"].all()  # ... and after the state was taken
        expected |= {f"{env_id} {name}": array for name, array in after.items()}
    (tmp_path / "states.json").write_text(json.dumps(states, allow_nan=False))
    arguments = [str(tmp_path / "states.json"), str(tmp_path / "results.npz")]
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    results = np.load(tmp_path / "results.npz")
    assert set(results) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(results[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_rewinds_in_place(env_id):
    batch = make(env_id)
    batch.reset()
    play(batch, 0)
    state = json.loads(json.dumps(batch.state()))
    expected = play(batch, 1)
    batch.restore(state)
    for name, array in play(batch, 1).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_one_environment_of_a_batch_continues_alone():
    batch = make("Pendulum-v1")
    batch.reset()
    play(batch, 0)
    state = batch.state()
    alone = make_environments("Pendulum-v1", [0], **TASKS["Pendulum-v1"])
    alone.restore({k: v[1:] if isinstance(v, list) else v for k, v in state.items()})
    action = np.array([[0.5], [-1.5]], np.float32)
    for _ in range(3):
        expected, step = batch.step(action), alone.step(action[1:])
        np.testing.assert_array_equal(
            step.observation["vector"][0], expected.observation["vector"][1]
        )
        assert step.valid[0] == expected.valid[1]


def test_atari_without_sticky_actions_continues():
    pytest.importorskip("cv2")
    batches = [make_environments("BreakoutNoFrameskip-v4", [seed]) for seed in (3, 4)]
    actions = np.random.default_rng(0).integers(4, size=(80, 1))
    batches[0].reset()
    for action in actions[:40]:
        batches[0].step(action)
    batches[1].restore(json.loads(json.dumps(batches[0].state())))
    for action in actions[40:]:
        expected, step = (batch.step(action) for batch in batches)
        np.testing.assert_array_equal(step.observation["image"], expected.observation["image"])
        assert step.reward == expected.reward


class Holder(gym.Env):
    """An environment that holds whatever it is given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


PAIR = np.zeros(2)


def roundtrip(**attributes):
    fresh = Holder(left_over=1)
    snapshot.restore(fresh, json.loads(json.dumps(snapshot.capture(Holder(**attributes)))))
    assert set(vars(fresh)) == set(attributes)
    return fresh


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**200,
        -0.1,
        float("inf"),
        "ä",
        b"\x00\xff",
        np.float32(0.1),
        np.bool_(1),
        np.str_("north"),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.array([[b"S", b"FF"]]),
        np.zeros((0, 3)),
        (1, [2, (3.5,)]),
        {1: "a", (0, 1): {"x": {3, 4}}},
        frozenset({1}),
        deque([1, 2], maxlen=2),
    ],
)
def test_plain_data_comes_back_equal_and_of_the_same_type(value):
    result = roundtrip(value=value).value
    assert type(result) is type(value)
    if isinstance(value, np.ndarray | np.generic):
        np.testing.assert_array_equal(result, value, strict=True)
    else:
        assert repr(result) == repr(value)


@pytest.mark.parametrize(
    "bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_random_generators_continue(bits):
    rng = np.random.Generator(bits(5))
    rng.integers(3, size=7, dtype=np.uint8)  # leaves half a word in the generator
    result = roundtrip(rng=rng).rng
    np.testing.assert_array_equal(result.integers(9, size=50), rng.integers(9, size=50))
    assert result.normal() == rng.normal()


def test_shared_and_recursive_objects_stay_so():
    array = np.zeros(2)
    history = [array]
    history.append(history)
    result = roundtrip(now=array, history=history)
    assert result.history[0] is result.now
    assert result.history[1] is result.history


def test_memory_order_is_kept():
    assert roundtrip(a=np.asfortranarray(np.ones((3, 4)))).a.flags.f_contiguous


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "builtins.object"),
        ([np.array([None])], "array of objects"),
        ([PAIR, PAIR[1:]], "shares its memory"),
        (np.frombuffer(bytearray(8)), "foreign memory"),
    ],
)
def test_what_cannot_be_saved_is_named(value, reason):
    with pytest.raises(snapshot.Uncapturable, match=f"Holder.thing .*{reason}"):
        snapshot.capture(Holder(thing=value))


def test_an_opaque_environment_says_so():
    batch = make_environments("toy/Opaque-v0", [0])
    batch.reset()
    assert batch.state() is None
    assert not batch.exact_state
    assert "Opaque.engine" in batch.state_note
    assert make_environments("toy/Counter-v0", [0]).exact_state


def test_a_randomised_model_is_noticed():
    batch = make("Hopper-v5")
    batch.reset()
    assert batch.exact_state
    batch.envs[1].unwrapped.model.body_mass[1] *= 1.1
    assert batch.state() is None
    assert "MuJoCo model" in batch.state_note


def test_a_state_of_something_else_is_refused():
    batch = make("CartPole-v1")
    batch.reset()
    state = batch.state()
    with pytest.raises(RgpoError, match="2 x CartPole-v1, not of 2 x Pendulum-v1"):
        make("Pendulum-v1").restore(state)
    with pytest.raises(RgpoError, match="not of 1 x CartPole-v1"):
        make_environments("CartPole-v1", [0], backend="gymnasium").restore(state)
    wrapped = make("CartPole-v1")
    wrapped.envs[0] = gym.wrappers.TimeLimit(wrapped.envs[0], 5)
    with pytest.raises(RgpoError, match="does not fit"):
        wrapped.restore(state)


if __name__ == "__main__":
    continue_all(*sys.argv[1:])
