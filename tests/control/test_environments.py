"""Autoreset, independence of seeds, backends, and every sentence a user can meet."""

import importlib.util
from math import atan2

import gymnasium as gym
import numpy as np
import pytest
import toy_environments

from rgpo.control import environments
from rgpo.control.environments import (
    EnvironmentFailed,
    NonFiniteEnvironment,
    make_environments,
)
from rgpo.errors import RgpoError

toy_environments.register()
BACKENDS = ["gymnasium", "envpool"]


def actions_for(space, seeds, steps):
    """One action stream per seed, the same wherever the seed stands in the batch: (T, E, ...)."""
    streams = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if isinstance(space, gym.spaces.Discrete):
            streams.append(rng.integers(space.n, size=steps))
        else:
            size = (steps, *space.shape)
            streams.append(rng.uniform(space.low, space.high, size).astype(np.float32))
    return np.stack(streams, 1)


def roll(env_id, seeds, backend, steps=120, **kwargs):
    """Observations (T+1, E, O) and the steps."""
    batch = make_environments(env_id, seeds, backend=backend, **kwargs)
    observations, taken = [batch.reset()["vector"]], []
    for action in actions_for(batch.action_space, seeds, steps):
        taken.append(batch.step(action))
        observations.append(taken[-1].observation["vector"])
    batch.close()
    return np.stack(observations), taken


def test_autoreset_by_hand():
    batch = make_environments("toy/Counter-v0", [1, 2], backend="gymnasium", end=2)
    first = batch.reset()["vector"]
    steps = [batch.step(np.array([0, 1])) for _ in range(4)]
    assert [s.observation["vector"][0, 0] for s in steps] == [1, 2, 0, 1]
    assert [s.reward.tolist() for s in steps] == [[1, 2], [1, 2], [0, 0], [1, 2]]
    assert [s.terminated[0] for s in steps] == [False, True, False, False]
    assert [s.valid[0] for s in steps] == [True, True, False, True]
    assert not any(s.truncated.any() for s in steps)
    # The final observation belongs to the episode that ends, the dummy step to the next one.
    episode = [s.observation["vector"][0, 1] for s in steps]
    assert episode[1] == first[0, 1] != episode[2] == episode[3]
    np.testing.assert_array_equal(batch.reset()["vector"], first)  # starts over from its seeds
    assert batch.step(np.array([0, 1])).valid.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_limit_truncates(backend):
    _, steps = roll("Pendulum-v1", [0, 1], backend, 12, max_episode_steps=5)
    assert [s.truncated.tolist() for s in steps[3:6]] == [[False] * 2, [True] * 2, [False] * 2]
    assert [s.valid.all() for s in steps] == [True] * 5 + [False] + [True] * 5 + [False]
    assert not any(s.terminated.any() for s in steps)
    assert steps[5].reward.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_an_environment_depends_on_its_seed_alone(env_id, backend):
    many, steps = roll(env_id, [5, 17, 9, 2**31 - 1], backend)
    few, _ = roll(env_id, [9, 17], backend)
    assert sum(s.terminated[1:3].sum() for s in steps) > 2
    np.testing.assert_array_equal(many[:, [2, 1]], few)
    assert not np.array_equal(many[:, 0], many[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_starts_over_from_the_seeds(backend):
    batch = make_environments("CartPole-v1", [3, 4], backend=backend)
    first = batch.reset()["vector"]
    after = [batch.step(np.array([0, 1])) for _ in range(15)][-1].observation["vector"]
    np.testing.assert_array_equal(batch.reset()["vector"], first)
    again = [batch.step(np.array([0, 1])) for _ in range(15)][-1].observation["vector"]
    np.testing.assert_array_equal(again, after)


def test_envpool_with_more_threads_gives_the_same_in_the_same_order():
    one, _ = roll("Hopper-v5", [5, 17, 9, 4], "envpool", 60)
    two, _ = roll("Hopper-v5", [5, 17, 9, 4], "envpool", 60, threads=2)
    np.testing.assert_array_equal(one, two)


def set_mujoco(skip):
    def put(env, seen):
        nq, nv = env.model.nq, env.model.nv
        env.set_state(np.r_[np.zeros(skip), seen[: nq - skip]], seen[nq - skip : nq - skip + nv])

    return put


@pytest.mark.parametrize(
    ("env_id", "put"),
    [
        ("CartPole-v1", lambda env, seen: setattr(env, "state", tuple(map(float, seen)))),
        (
            "Pendulum-v1",
            lambda env, seen: setattr(env, "state", np.array([atan2(seen[1], seen[0]), seen[2]])),
        ),
        ("InvertedPendulum-v5", set_mujoco(0)),
        ("Hopper-v5", set_mujoco(1)),
        ("HalfCheetah-v5", set_mujoco(1)),
    ],
)
def test_envpool_is_the_same_task(env_id, put):
    """From EnvPool's state, Gymnasium's environment gives EnvPool's next state and reward."""
    seeds = [1, 2]
    states, steps = roll(env_id, seeds, "envpool", 60)
    assert make_environments(env_id, seeds).backend == "envpool"
    theirs = make_environments(env_id, [0], backend="gymnasium")
    env = theirs.envs[0]
    actions = actions_for(env.action_space, seeds, 60)
    compared = 0
    for t, step in enumerate(steps):
        for i in range(2):
            # Hopper shows velocities clipped to 10: then its state is not known.
            if not step.valid[i] or (env_id == "Hopper-v5" and (abs(states[t, i]) >= 10).any()):
                continue
            env.reset()
            put(env.unwrapped, states[t, i].astype(np.float64))
            seen, reward, terminated, _, _ = env.unwrapped.step(actions[t, i])
            np.testing.assert_allclose(states[t + 1, i], seen, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(step.reward[i], reward, rtol=1e-4, atol=1e-4)
            assert terminated == step.terminated[i]
            compared += 1
    assert compared > 60


@pytest.mark.parametrize(
    ("env_id", "kwargs", "backend"),
    [
        ("CartPole-v1", {}, "envpool"),
        ("CartPole-v1", {"max_episode_steps": 9}, "gymnasium"),
        ("Hopper-v5", {}, "envpool"),
        ("Hopper-v4", {}, "gymnasium"),
        ("FrozenLake-v1", {}, "gymnasium"),
        ("toy/Counter-v0", {}, "gymnasium"),
    ],
)
def test_auto_takes_envpool_only_where_it_is_the_same(env_id, kwargs, backend):
    assert make_environments(env_id, [0], **kwargs).backend == backend


def test_auto_without_envpool(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "envpool" else find(name)
    )
    assert make_environments("CartPole-v1", [0]).backend == "gymnasium"
    with pytest.raises(RgpoError, match=r"pip install \"rgpo\[fast\]\""):
        make_environments("CartPole-v1", [0], backend="envpool")


def test_envpool_images_and_discrete_observations():
    pong = make_environments("Pong-v5", [0, 1], backend="envpool")
    image = pong.reset()["image"]
    assert image.shape == (2, 4, 84, 84)
    assert image.dtype == np.uint8
    lake = make_environments("FrozenLake-v1", [0, 1], backend="envpool")
    np.testing.assert_array_equal(lake.reset()["vector"], np.eye(16)[[0, 0]])
    assert lake.step(np.array([1, 2])).valid.all()


def test_envpool_says_that_it_has_no_state():
    batch = make_environments("CartPole-v1", [0], backend="envpool")
    assert batch.state() is None
    assert not batch.exact_state
    assert "envpool" in batch.state_note
    with pytest.raises(RgpoError, match="cannot be restored"):
        batch.restore({})


def test_atari_has_the_usual_preprocessing():
    pytest.importorskip("cv2")
    batch = make_environments("ALE/Pong-v5", [0, 1])
    image = batch.reset()["image"]
    assert (image.shape, image.dtype) == ((2, 4, 84, 84), np.uint8)
    step = batch.step(np.array([0, 2]))
    np.testing.assert_array_equal(step.observation["image"][:, 2], image[:, 3])
    assert "does not tell" in batch.state_note  # sticky actions


def test_module_ids(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\nfrom toy_environments import Counter\n"
        "gymnasium.register('Mine-v3', entry_point=Counter)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_environments("my_tasks:Mine-v3", [0]).reset()["vector"].shape == (1, 2)
    with pytest.raises(RgpoError, match=r"'your_tasks'.* is not there"):
        make_environments("your_tasks:Mine-v3", [0])


@pytest.mark.parametrize(
    ("env_id", "sentence"),
    [
        ("Hoper-v5", "did you mean Hopper-v5"),
        ("Hopper-v77", "did you mean Hopper-v"),
        ("nonsense", r"There is no environment 'nonsense'; .*pprint_registry"),
        ("nowhere/Thing-v0", "No installed package registers"),
        ("LunarLander-v3", "(?i)box2d|could not be made"),
    ],
)
def test_unknown_ids(env_id, sentence):
    with pytest.raises(RgpoError, match=sentence):
        make_environments(env_id, [0], backend="gymnasium")


def test_unknown_id_in_envpool():
    with pytest.raises(RgpoError, match=r"EnvPool has no environment .* did you mean .*Hopper-v5"):
        make_environments("Hoper-v5", [0], backend="envpool")


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_told(backend):
    with pytest.raises(RgpoError, match=r"could not be made .*wings"):
        make_environments("Hopper-v5", [0], backend=backend, wings=2)


def test_atari_without_its_packages(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ale_py" else find(name)
    )
    for name in [name for name in gym.registry if name.startswith("ALE/")]:
        monkeypatch.delitem(gym.registry, name)
    with pytest.raises(RgpoError, match=r"pip install \"rgpo\[atari\]\""):
        make_environments("ALE/Pong-v5", [0])


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_out_of_range(seed):
    with pytest.raises(RgpoError, match=str(seed)):
        make_environments("CartPole-v1", [0, seed])


def test_no_seeds_and_wrong_number_of_actions():
    with pytest.raises(ValueError, match="at least one seed"):
        make_environments("CartPole-v1", [])
    for backend in BACKENDS:
        batch = make_environments("CartPole-v1", [0, 1], backend=backend)
        batch.reset()
        with pytest.raises(ValueError, match="got 3"):
            batch.step(np.array([0, 1, 0]))


def faulty_batch(kind):
    """Two environments of which only the second fails, at its third step."""
    batch = make_environments("toy/Counter-v0", [0, 1], backend="gymnasium", kind=kind)
    batch.envs[1].unwrapped.fault = 3
    batch.reset()
    for _ in range(2):
        batch.step(np.array([0, 0]))
    return batch


def test_an_environment_that_raises_is_named():
    with pytest.raises(EnvironmentFailed, match=r"Environment 1 .* the wheel came off") as caught:
        faulty_batch("raise").step(np.array([0, 0]))
    assert caught.value.index == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("part", ["reward", "observation"])
def test_numbers_that_are_not_finite_are_named(part):
    with pytest.raises(NonFiniteEnvironment, match=f"Environment 1 .* {part}") as caught:
        faulty_batch(part).step(np.array([0, 0]))
    assert (caught.value.index, caught.value.part) == (1, part)


def test_half_cheetah_leaves_no_log_and_prints_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_environments("HalfCheetah-v5", [0], backend="gymnasium").reset()
    assert list(tmp_path.iterdir()) == []
    assert "settotalmass" not in "".join(capfd.readouterr())


def test_other_mujoco_warnings_are_logged(caplog):
    make_environments("HalfCheetah-v5", [0], backend="gymnasium")
    import mujoco

    mujoco.get_mju_user_warning()("Nan, Inf or huge value in QACC")
    assert "huge value in QACC" in caplog.text
    assert caplog.records[0].name == environments.__name__
