"""Runs on disk: resumed bit for bit, stopped cleanly, failed with a sentence."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_environments

from rgpo.control import session
from rgpo.control.config import TrainConfig
from rgpo.control.train import Trainer
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run

UPDATES = 4
TINY = TrainConfig(
    env="CartPole-v1",
    num_envs=2,
    rollout_steps=32,
    minibatch_size=32,
    epochs=2,
    hidden=(16, 16),
    steps=64 * UPDATES,
    checkpoint_every=2,
    eval_episodes=0,
    backend="gymnasium",
    track=(),
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def tiny(**changes) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def stop_after(updates):
    """A progress callback that is as good as Ctrl-C after so many updates."""

    def progress(done, *_):
        if done == updates:
            signal.raise_signal(signal.SIGINT)

    return progress


def resume_in_new_process(paths):
    code = (
        "import sys, torch, pathlib; from rgpo.control import session; torch.set_num_threads(1); "
        "print(session.resume([pathlib.Path(p) for p in sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rows_of(path):
    rows = Run.open(path).metrics()
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def final_checkpoint(path):
    return checkpoint.newest(Run.open(path).checkpoints)[0]


def assert_same_run(mine, theirs):
    assert rows_of(mine) == rows_of(theirs)
    first, second = final_checkpoint(mine), final_checkpoint(theirs)
    assert first.update == second.update == UPDATES
    assert first.state == second.state
    assert first.tensors.keys() == second.tensors.keys()
    for key in first.tensors:
        assert torch.equal(first.tensors[key], second.tensors[key]), key


# ---- start and resume ---------------------------------------------------------------------


def test_a_finished_run(tmp_path):
    path = tmp_path / "run"
    assert session.start([tiny(eval_episodes=2)], [path]) == ["finished"]
    run = Run.open(path)
    assert run.config["learner_used"] == "FastLearner"
    assert run.config["hyper_parameters"]["sharpness"] == 10
    assert session.config_of(run) == tiny(eval_episodes=2)
    assert [row["update"] for row in run.metrics()] == [1, 2, 3, 4]
    assert run.status["status"] == "finished"
    returns = run.status["result"]["eval_returns"]
    assert run.status["result"]["eval_return"] == np.mean(returns)
    np.testing.assert_array_equal(session.evaluate_run(path, episodes=2).returns, returns)
    with pytest.raises(RgpoError, match="has all its 4 updates: nothing to resume"):
        session.resume([path])
    assert Run.open(path).status["status"] == "finished"


def test_evaluation_uses_the_normalisation_of_the_run(tmp_path):
    """The same as playing by hand with the policy and the moments of the checkpoint."""
    config = tiny(env="Pendulum-v1", learning_rate=0.01)
    session.start([config], [tmp_path / "run"])
    result = session.evaluate_run(tmp_path / "run", episodes=1, seed=3)
    tensors = final_checkpoint(tmp_path / "run").tensors
    env = gym.make("Pendulum-v1")
    observation, total, over = env.reset(seed=3)[0], 0.0, False
    while not over:
        x = torch.from_numpy(observation.astype(np.float64)) - tensors["obs.mean"]
        x = torch.clamp(x / torch.sqrt(tensors["obs.variance"] + 1e-8), -10, 10).float()
        for layer in (0, 2, 4):
            weight = tensors[f"policy.actor.{layer}.weight"]
            x = weight @ x + tensors[f"policy.actor.{layer}.bias"]
            x = torch.tanh(x) if layer < 4 else x
        observation, reward, terminated, truncated, _ = env.step(np.clip(x.numpy(), -2, 2))
        total, over = total + float(reward), terminated or truncated
    assert result.returns[0] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("env", "backend"),
    [
        ("CartPole-v1", "gymnasium"),
        ("Pendulum-v1", "gymnasium"),
        ("Hopper-v5", "gymnasium"),
        ("rgpo/Quadrotor", "vector"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, env, backend):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    config = tiny(env=env, backend=backend)
    session.start([config], [straight])
    assert session.start([config], [broken], stop_after(2)) == ["interrupted"]
    status = Run.open(broken).status
    assert status["status"] == "interrupted"
    assert "rgpo resume" in status["message"]
    assert final_checkpoint(broken).update == 2
    assert resume_in_new_process([broken]) == "['finished']"
    assert_same_run(straight, broken)


def test_a_package_installed_in_between_changes_nothing(tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    session.start([tiny()], [straight])
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "envpool" else find(name)
        )
        session.start([tiny(backend="auto")], [broken], stop_after(2))
    assert session.resume([broken]) == ["finished"]
    assert_same_run(straight, broken)


@pytest.mark.parametrize("change", [{"staleness": 2}, {"recipe": "ppo-ewma"}])
def test_old_policies_and_extra_heads_are_part_of_a_checkpoint(tmp_path, change):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    session.start([tiny(**change)], [straight])
    session.start([tiny(**change)], [broken], stop_after(3))
    assert resume_in_new_process([broken]) == "['finished']"
    assert_same_run(straight, broken)


def test_runs_that_train_together_are_resumed_together(tmp_path):
    configs = [tiny(), tiny(recipe="ppo", seed=1)]
    straight = [tmp_path / "straight0", tmp_path / "straight1"]
    broken = [tmp_path / "broken0", tmp_path / "broken1"]
    session.start(configs, straight)
    session.start(configs, broken, stop_after(3))
    final_checkpoint(broken[0]).path.unlink()  # killed while it saved: one of them has update 3
    assert resume_in_new_process(broken) == "['finished', 'finished']"
    for mine, theirs in zip(straight, broken, strict=True):
        assert_same_run(mine, theirs)


@contextlib.contextmanager
def killed_while_it_saves(monkeypatch, path):
    """The end comes when the run in `path` is about to save its last update."""
    save = checkpoint.save

    def killed(folder, update, *state):
        if update == UPDATES and folder.parent == path:
            raise KeyboardInterrupt
        return save(folder, update, *state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("keep", [1, 3])
def test_a_kill_between_the_saves_of_two_runs_leaves_an_update_in_common(
    tmp_path, monkeypatch, keep
):
    configs = [tiny(keep=keep), tiny(recipe="ppo", seed=1, keep=keep)]
    straight = [tmp_path / "straight0", tmp_path / "straight1"]
    broken = [tmp_path / "broken0", tmp_path / "broken1"]
    session.start(configs, straight)
    with killed_while_it_saves(monkeypatch, broken[1]):
        session.start(configs, broken)
    assert final_checkpoint(broken[0]).update == UPDATES
    assert final_checkpoint(broken[1]).update == 2
    assert resume_in_new_process(broken) == "['finished', 'finished']"
    for mine, theirs in zip(straight, broken, strict=True):
        assert_same_run(mine, theirs)
        assert len(list((theirs / "checkpoints").glob("*.json"))) <= keep


@pytest.mark.parametrize("keep", [1, 2])
def test_stopped_again_before_the_update_that_one_run_had_saved(tmp_path, monkeypatch, keep):
    """The newer checkpoint of one run, from before the kill, must not outlive the common one."""
    configs = [tiny(keep=keep, seed=seed) for seed in range(2)]
    straight = [tmp_path / "straight0", tmp_path / "straight1"]
    broken = [tmp_path / "broken0", tmp_path / "broken1"]
    session.start(configs, straight)
    start = functools.partial(session.start, configs, broken)
    for _ in range(keep):
        with killed_while_it_saves(monkeypatch, broken[1]):
            start()
        start = functools.partial(session.resume, broken)
        assert final_checkpoint(broken[0]).update == UPDATES
    assert session.resume(broken, stop_after(3)) == ["interrupted", "interrupted"]
    assert [final_checkpoint(path).update for path in broken] == [3, 3]
    assert session.resume(broken) == ["finished", "finished"]
    for mine, theirs in zip(straight, broken, strict=True):
        assert_same_run(mine, theirs)


def test_killed_while_it_evaluates_a_run_is_evaluated_when_resumed(tmp_path, monkeypatch):
    config, path = tiny(eval_episodes=2), tmp_path / "run"
    session.start([config], [tmp_path / "straight"])

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            session.start([config], [path])
    assert Run.open(path).status["status"] == "unfinished"
    told = []
    assert session.resume([path], lambda *event: told.append(event)) == ["finished"]
    assert [(done, total, rows[0]["update"]) for done, total, rows in told] == [(4, 4, 4)]
    results = [Run.open(p).status["result"] for p in (path, tmp_path / "straight")]
    assert results[0] == results[1]
    assert_same_run(path, tmp_path / "straight")


def test_envpool_resumes_with_new_episodes(tmp_path):
    pytest.importorskip("envpool")
    path = tmp_path / "run"
    session.start([tiny(backend="envpool")], [path], stop_after(2))
    before = final_checkpoint(path)
    assert before.state["environments"] is None
    assert session.resume([path]) == ["finished"]
    assert [row["update"] for row in rows_of(path)] == [1, 2, 3, 4]
    # an episode's length counts from the resumption, where its environment started anew
    after = final_checkpoint(path).tensors
    assert (after["running_length"] <= 32 * 2).all()


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(tmp_path):
    straight, path = tmp_path / "straight", tmp_path / "run"
    session.start([TINY], [straight])
    session.start([tiny(checkpoint_every=1)], [path], stop_after(3))
    newest = final_checkpoint(path).path
    tensors = newest.with_suffix(".safetensors")
    damaged = tensors.read_bytes()[:-8] + b"rubbish!"
    tensors.write_bytes(damaged)
    with pytest.warns(UserWarning, match=tensors.name):
        assert session.resume([path]) == ["finished"]
    assert_same_run(straight, path)
    assert tensors.read_bytes() == damaged


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    session.start([TINY], [tmp_path / "run"])
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(RgpoError, match="no whole checkpoint"):
        session.resume([tmp_path / "run"])


def test_a_refusal_leaves_no_directory(tmp_path):
    for config in (tiny(recipe="gspo"), tiny(env="CartPol-v1"), tiny(track=("tensorbord",))):
        with pytest.raises(RgpoError):
            session.start([config], [tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# ---- Ctrl-C -------------------------------------------------------------------------------


def test_ctrl_c_saves_and_resume_finishes(tmp_path):
    path = tmp_path / "run"
    options = "--env CartPole-v1 --num-envs 2 --rollout-steps 64 --minibatch-size 64 --epochs 2 "
    options += "--steps 25600 --eval-episodes 1 --track --backend gymnasium"
    command = [sys.executable, "-m", "rgpo.cli", "train", *options.split(), "--out", str(path)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert err == ""
    assert "rgpo resume" in out
    done = rows_of(path)[-1]["update"]
    assert 2 <= done < 200
    assert final_checkpoint(path).update == done
    command = [sys.executable, "-m", "rgpo.cli", "resume", str(path)]
    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "evaluation return" in resumed.stdout
    assert [row["update"] for row in rows_of(path)] == list(range(1, 201))


# ---- failures -----------------------------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch):
    """Register a task that goes wrong at its 20th step."""

    def register(kind):
        name = f"toy/Faulty-{kind}-v0"
        arguments = {"end": 100, "fault": 20, "kind": kind}
        monkeypatch.setitem(
            gym.registry,
            name,
            gym.envs.registration.EnvSpec(
                name, entry_point=toy_environments.Counter, kwargs=arguments
            ),
        )
        return name

    return register


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("raise", "environment 0 of the run raised ZeroDivisionError: the wheel came off"),
        ("reward", "environment 0 of the run gave a NaN or infinite reward"),
        ("observation", "environment 0 of the run gave a NaN or infinite observation"),
    ],
)
def test_a_faulty_environment_fails_the_run(tmp_path, faulty, kind, sentence):
    env, path = faulty(kind), tmp_path / "run"
    config = tiny(env=env, rollout_steps=8, minibatch_size=16, checkpoint_every=1, steps=64)
    (status,) = session.start([config], [path])
    assert status.startswith(f"failed: {sentence}")
    assert "step 32" in status  # two updates of 16 steps; the third rollout broke
    assert "last checkpoint is that of update 2" in status
    run = Run.open(path)
    assert run.status["status"] == "failed"
    assert status == f"failed: {run.status['message']}"
    assert final_checkpoint(path).update == 2
    assert len(rows_of(path)) == 2


def test_a_run_that_does_not_fit_into_memory_is_refused_before_it_starts(tmp_path):
    config = tiny(rollout_steps=2**36)
    with pytest.raises(RgpoError, match=r"one run needs about \d.* GiB .* take fewer environments"):
        session.start([config], [tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_a_fault_before_the_first_checkpoint(tmp_path, faulty):
    (status,) = session.start([tiny(env=faulty("reward"))], [tmp_path / "run"])
    assert "(after step 0): repair the environment" in status
    assert status.endswith("; no checkpoint was saved yet")


@pytest.mark.parametrize("kind", ["raise", "observation"])
def test_one_environment_crashes_and_the_other_runs_do_not_notice(tmp_path, monkeypatch, kind):
    """Bit for bit, their checkpoints included, against a batch in which nothing crashed."""
    name = "toy/Fragile-v0"
    spec = gym.envs.registration.EnvSpec(
        name, entry_point=toy_environments.Fragile, kwargs={"fault": 50, "kind": kind}
    )
    monkeypatch.setitem(gym.registry, name, spec)
    configs = [
        tiny(env=name, seed=seed, recipe=recipe, checkpoint_every=1)
        for seed, recipe in enumerate(["rgpo", "ppo", "gipo"])
    ]
    victim = Trainer(configs).environments.seeds[3]  # the second environment of the second run
    paths = {}
    for told, victims in (("whole", ()), ("crashed", (victim,))):
        monkeypatch.setattr(toy_environments.Fragile, "victims", victims)
        paths[told] = [tmp_path / told / str(i) for i in range(3)]
        statuses = session.start(configs, paths[told])
        assert [statuses[0], statuses[2]] == ["finished"] * 2
    assert statuses[1].startswith("failed: environment 1 of the run ")
    assert "(after step 64): repair the environment" in statuses[1]
    assert statuses[1].endswith("; its last checkpoint is that of update 1")
    for i in (0, 2):
        assert_same_run(paths["whole"][i], paths["crashed"][i])
    assert rows_of(paths["crashed"][1]) == rows_of(paths["whole"][1])[:1]


def test_envpool_fails_as_a_whole(tmp_path, monkeypatch):
    envpool = pytest.importorskip("rgpo.control.envpool")
    pytest.importorskip("envpool")
    make, calls = envpool.EnvPoolEnvironments.reset, []

    def stopping(self):
        observation = make(self)
        pool = self._pool

        class Stopping:
            close = pool.close

            @staticmethod
            def step(action):
                calls.append(action)
                if len(calls) == 40:
                    raise RuntimeError("out of shared memory")
                return pool.step(action)

        self._pool = Stopping
        return observation

    monkeypatch.setattr(envpool.EnvPoolEnvironments, "reset", stopping)
    configs = [tiny(backend="envpool", seed=seed, checkpoint_every=1) for seed in range(2)]
    paths = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(RgpoError, match="EnvPool stopped with RuntimeError: out of shared memory"):
        session.start(configs, paths)
    for path in paths:
        status = Run.open(path).status
        assert status["status"] == "failed"
        assert "every run of the batch" in status["message"]
        assert "last checkpoint is that of update 1" in status["message"]


def test_a_diverged_run_is_failed_and_its_neighbour_finishes(tmp_path):
    configs = [tiny(env="Pendulum-v1", seed=s, checkpoint_every=1) for s in range(2)]
    configs[0] = dataclasses.replace(configs[0], learning_rate=1e30)
    paths = [tmp_path / "broken", tmp_path / "healthy"]
    broken, healthy = session.start(configs, paths)
    assert broken.startswith("failed: update 1 (step 64) had a non-finite")
    assert "no checkpoint was saved yet" in broken
    assert healthy == "finished"
    assert Run.open(paths[0]).status["status"] == "failed"
    assert list((paths[0] / "checkpoints").iterdir()) == []
    assert len(rows_of(paths[1])) == UPDATES
    for file in (paths[1] / "checkpoints").glob("*.json"):
        tensors = checkpoint.load(file).tensors
        assert all(torch.isfinite(t).all() for t in tensors.values())
        assert json.loads(file.read_text())["update"] > 0


def test_a_failing_evaluation_leaves_finished_runs_finished(tmp_path, monkeypatch):
    evaluate, calls = session.evaluate_run, []

    def fails_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RgpoError("Environment 0 of the batch raised ValueError: no")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(session, "evaluate_run", fails_second)
    paths = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(RgpoError, match="no"):
        session.start([tiny(eval_episodes=1, seed=s) for s in range(2)], paths)
    assert [Run.open(p).status["status"] for p in paths] == ["finished", "failed"]
