"""Rollouts: episodes go on across them, and end when those of a plain loop do."""

import gymnasium as gym
import numpy as np

from rgpo.control.collect import Collector
from rgpo.control.distributions import distribution_for
from rgpo.control.environments import make_environments
from rgpo.control.normalize import ObservationNormalizer

ENV, RUNS, ENVS, STEPS = "CartPole-v1", 2, 3, 16


def make_collector(*, enabled=False):
    environments = make_environments(ENV, range(RUNS * ENVS), backend="gymnasium")
    distribution = distribution_for(environments.action_space)
    normalizer = ObservationNormalizer(RUNS, 4, enabled=enabled)
    return Collector(environments, distribution, normalizer, RUNS)


def at_random(seed):
    """A policy that acts at random and notes what it saw and did."""
    rng, seen, done = np.random.default_rng(seed), [], []

    def act(observation, noise):
        assert noise.shape == (RUNS, ENVS, 1)
        seen.append(observation["vector"].copy())
        done.append(rng.integers(2, size=(RUNS, ENVS, 1)))
        return done[-1]

    return act, seen, done


def test_episodes_across_rollouts_are_those_of_a_plain_loop():
    collector, (act, _, actions) = make_collector(), at_random(0)
    noise = np.zeros((RUNS, STEPS, ENVS, 1), np.float32)
    rollouts = [collector.collect(act, noise) for _ in range(6)]
    found = [sorted(e for rollout in rollouts for e in rollout.episodes[r]) for r in range(RUNS)]
    expected = [[] for _ in range(RUNS)]
    for i, seed in enumerate(collector.environments.seeds):
        run, place = divmod(i, ENVS)
        env, total, length, over = gym.make(ENV), 0.0, 0, False
        env.reset(seed=seed)
        for action in actions:
            if over:
                env.reset()
                total, length, over = 0.0, 0, False
                continue
            _, reward, terminated, truncated, _ = env.step(int(action[run, place, 0]))
            total, length, over = total + float(reward), length + 1, terminated or truncated
            if over:
                expected[run].append((total, length))
    assert found == [sorted(e) for e in expected]
    assert min(len(e) for e in expected) > 3


def test_a_rollout_holds_what_the_policies_saw_and_what_came_last():
    """Normalised by statistics that the rollout itself changes only afterwards."""
    collector, (act, seen, actions) = make_collector(enabled=True), at_random(1)
    collector.normalizer.moments.mean += 0.5
    collector.normalizer.refresh()
    noise = np.zeros((RUNS, STEPS, ENVS, 1), np.float32)
    first, second = collector.collect(act, noise), collector.collect(act, noise)
    found = [rollout.observation["vector"] for rollout in (first, second)]
    np.testing.assert_array_equal(found[0][:, :-1], np.stack(seen[:STEPS], 1))
    np.testing.assert_array_equal(found[0][:, -1], found[1][:, 0])
    np.testing.assert_array_equal(first.action, np.stack(actions[:STEPS], 1))
    raw = found[0][:, :-1].reshape(RUNS, -1, 4) + 0.5
    both = np.concatenate([raw, found[1][:, :-1].reshape(RUNS, -1, 4) + 0.5], 1)
    np.testing.assert_allclose(collector.normalizer.moments.mean, both.mean(1), atol=1e-5)
