"""Plans of comparisons: which runs there are, in which order, and who trains them."""

import dataclasses
import itertools
import os
import signal

import gymnasium as gym
import numpy as np
import pytest

from rgpo.control import memory
from rgpo.control.config import TrainConfig
from rgpo.control.train import Trainer
from rgpo.errors import RgpoError
from rgpo.runs.directory import Run
from rgpo.studies.compare import Plan, plan, report, run

BASE = TrainConfig(env="CartPole-v1", seed=3)


class Blank(gym.Env):
    """One observation for ever."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, observation):
        self.observation_space = observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return np.zeros(self.observation_space.shape, np.uint8), {}

    def step(self, action):  # noqa: ARG002
        return np.zeros(self.observation_space.shape, np.uint8), 0.0, False, False, {}


ARMS = ("trpo", "rgpo", "ppo:clip_low=0.1,clip_high=0.3", "s-ppo-variant")


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 100])
def test_every_arm_has_every_seed_once_in_the_order_of_the_arms(tmp_path, workers):
    planned = plan(BASE, ARMS, 3, tmp_path, workers=workers)
    labels = ["trpo"] * 3 + ["rgpo"] * 3 + ["ppo clip_low=0.1 clip_high=0.3"] * 3
    labels += ["s-ppo-variant"] * 3
    assert [c.label for c in planned.configs] == labels
    assert [c.seed for c in planned.configs] == [3, 4, 5] * 4
    assert len({planned.path(c) for c in planned.configs}) == 12
    assert sorted(itertools.chain(*planned.deal)) == list(range(12))
    assert planned.parallel == min(workers, 12)
    for group in planned.groups:  # the fast learner's together, equal objectives side by side
        slow = {c.recipe in ("trpo", "s-ppo-variant") for c in group}
        assert len(slow) == 1
        changes = sum(a.label != b.label for a, b in itertools.pairwise(group))
        assert changes == len({c.label for c in group}) - 1


def test_arms_may_differ_in_the_learning_rate_and_the_radius(tmp_path):
    arms = ("ppo", "ppo:learning_rate=1e-3", "trpo:max_kl=0.02")
    planned = plan(BASE, arms, 2, tmp_path, workers=1)
    assert [c.learning_rate for c in planned.configs[::2]] == [3e-4, 1e-3, 3e-4]
    assert planned.configs[-1].max_kl == 0.02
    assert planned.deal == ((4, 5), (0, 1, 2, 3))  # both rates in one computation
    assert planned.path(planned.configs[2]).name == "ppo-learning_rate1e-3-seed3"


def test_runs_that_do_not_fit_into_memory_are_trained_in_waves(tmp_path, monkeypatch):
    trainer = Trainer([BASE])
    need = memory.footprint(trainer)
    trainer.environments.close()
    free = (2 * need.per_process + 6.5 * need.per_run) / memory.SHARE
    monkeypatch.setattr(memory, "available_bytes", lambda _: int(free))
    with pytest.warns(UserWarning, match=r"16 runs need about .* GiB .*: training 6 at a time"):
        planned = plan(BASE, ["rgpo", "ppo"], 8, tmp_path, workers=2)
    assert planned.parallel == 2
    assert len(planned.deal) == 6  # 3 waves of 2 processes
    assert sorted(itertools.chain(*planned.deal)) == list(range(16))
    assert max(map(len, planned.deal)) == 3
    monkeypatch.setattr(memory, "available_bytes", lambda _: need.per_run)
    with pytest.warns(UserWarning, match="training 1 at a time"):
        planned = plan(BASE, ["rgpo", "ppo"], 1, tmp_path, workers=2)
    assert (planned.parallel, planned.deal) == (1, ((0,), (1,)))
    monkeypatch.setattr(memory, "available_bytes", lambda _: need.per_run // 2)
    with pytest.raises(RgpoError, match=r"one run needs about .* take fewer environments"):
        plan(BASE, ["rgpo", "ppo"], 1, tmp_path, workers=2)


def test_waves_follow_each_other_and_what_the_fast_learner_lacks_is_spread_over_them(tmp_path):
    """Stopped after the first wave: the second has not begun, and begins when resumed."""
    base = dataclasses.replace(
        BASE, hidden=(16, 8), num_envs=2, rollout_steps=32, minibatch_size=32, epochs=2, steps=256,
        eval_episodes=0, track=(), backend="gymnasium",
    )  # fmt: skip
    planned = dataclasses.replace(
        plan(base, ["rgpo", "ppo"], 1, tmp_path / "study", workers=2), parallel=1
    )
    assert planned.deal == ((0,), (1,))
    seen = []

    def watch(group, update, total, _):
        seen.append((group, update))
        if (group, update) == (0, total):
            signal.raise_signal(signal.SIGTERM)

    assert run(planned, watch) == (["finished", "interrupted"], [])
    assert seen == [(0, update) for update in (1, 2, 3, 4)]
    assert [c.recipe for c in planned.started] == ["rgpo"]
    assert report(planned).exists()
    again = []
    resumed = run(Plan.load(tmp_path / "study"), lambda *event: again.append(event))
    assert resumed == (["finished", "finished"], [])
    assert [event[:2] for event in again] == [(0, 4)] + [(1, update) for update in (1, 2, 3, 4)]
    assert again[0][3][0]["update"] == 4  # a progress display counts what was finished before
    for config in planned.configs:
        assert Run.open(planned.path(config)).config["learner_used"] == "PlainLearner"


def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(tmp_path):
    """Told by the parent, once: the worker's own terminal lines would break the progress bar."""
    base = dataclasses.replace(
        BASE, num_envs=2, rollout_steps=32, minibatch_size=32, epochs=2, steps=64 * 30,
        eval_episodes=0, track=(), checkpoint_every=1,
    )  # fmt: skip
    planned = plan(base, ["ppo"], 1, tmp_path / "study", workers=1)

    def stop(*event):
        if event[1] == 3:
            signal.raise_signal(signal.SIGTERM)

    assert run(planned, stop) == (["interrupted"], [])
    folder = planned.path(planned.configs[0]) / "checkpoints"
    newest = max(folder.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    updates = []
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        run(planned, lambda *event: updates.append(event[1]))
    assert updates[0] == int(newest.stem.removeprefix("update-"))
    assert updates[-1] == 30


def test_a_worker_that_dies_of_an_unforeseen_error_is_told_and_the_others_finish(tmp_path, capfd):
    base = dataclasses.replace(
        BASE, num_envs=2, rollout_steps=32, minibatch_size=32, epochs=2, steps=256,
        eval_episodes=0, track=(),
    )  # fmt: skip
    planned = plan(base, ["ppo"], 2, tmp_path / "study", workers=2)
    broken = dataclasses.replace(planned.configs[0], device="meta")  # it computes nothing
    planned = dataclasses.replace(planned, configs=(broken, planned.configs[1]))
    statuses, errors = run(planned)
    assert statuses == ["unfinished", "finished"]
    assert errors == ["a worker died with exit code 1: resume the comparison to go on"]
    assert "Traceback" in capfd.readouterr().err
    assert report(planned).exists()


def test_images_get_the_cores_that_are_left(tmp_path, monkeypatch):
    """2 runs on 6 cores: 3 threads each, where there are matrices large enough to split."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    image = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    monkeypatch.setitem(gym.registry, "toy/Image-v0", gym.envs.registration.EnvSpec(
        "toy/Image-v0", entry_point=Blank, kwargs={"observation": image}
    ))  # fmt: skip
    for env, threads in (("toy/Image-v0", 3), ("CartPole-v1", 1)):
        base = dataclasses.replace(BASE, env=env)
        planned = plan(base, ["ppo"], 2, tmp_path)
        assert (planned.parallel, planned.threads) == (2, threads)


def test_a_saved_plan_is_loaded(tmp_path):
    planned = plan(dataclasses.replace(BASE, hidden=(8,)), ARMS, 2, tmp_path, command="rgpo x")
    planned.save()
    assert Plan.load(tmp_path) == planned


def test_a_damaged_plan_is_refused(tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(RgpoError, match="no readable comparison"):
        Plan.load(tmp_path)
