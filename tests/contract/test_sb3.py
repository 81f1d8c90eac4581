"""Stable-Baselines3: `GatedPPO` against SB3's own PPO."""

import importlib
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from common import run_example
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes

from rgpo.adapters import common as adapters
from rgpo.adapters import sb3
from rgpo.adapters.sb3 import GatedPPO
from rgpo.errors import RgpoError

SHORT = {"n_steps": 128, "batch_size": 32, "n_epochs": 4, "seed": 3}


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def update(model, shift):
    """One update on a real rollout whose behaviour log-probs are shifted by `shift` (T, 1)."""
    model.set_random_seed(3)  # the seeds of torch and numpy are global
    model.learn(model.n_steps)  # the logger, the buffer and one ordinary update
    callback = model._init_callback(None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model.rollout_buffer.log_probs -= shift.astype(np.float32)
    model.train()
    return parameters(model)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(
    "extra", [{}, {"target_kl": 0.001, "ent_coef": 0.01, "clip_range_vf": 5.0}]
)
def test_recipe_ppo_is_sb3s_own_run_bit_for_bit(env, extra):
    settings = SHORT | {"learning_rate": 3e-3} | extra
    host = PPO("MlpPolicy", env, **settings).learn(6 * 128)  # the seed of torch is global
    ours = GatedPPO("MlpPolicy", env, recipe="ppo", **settings).learn(6 * 128)
    assert torch.equal(parameters(host), parameters(ours))
    logged = ours.logger.name_to_value
    for name, number in host.logger.name_to_value.items():
        assert logged[name] == number, name
    if extra:  # target_kl ended updates early, in both
        assert host._n_updates == ours._n_updates < 6 * 4
    else:
        assert host._n_updates == 6 * 4


@pytest.mark.parametrize(("batch_size", "tolerance"), [(32, 0), (24, 1e-5)])
def test_parity_with_ratios_far_from_one(batch_size, tolerance):
    """Bit for bit where the minibatch is a power of 2: r A / B rounds the same in any order."""
    settings = SHORT | {"n_steps": 96, "batch_size": batch_size}
    shift = np.random.default_rng(0).normal(size=(96, 1))
    host = PPO("MlpPolicy", "CartPole-v1", **settings)
    ours = GatedPPO("MlpPolicy", "CartPole-v1", recipe="ppo", **settings)
    difference = (update(host, shift) - update(ours, shift)).abs().max()
    assert difference <= tolerance
    # pinned: SB3 counts |r - 1| > 0.2 whatever the sign of A, the core only samples without force
    host_fraction = host.logger.name_to_value["train/clip_fraction"]
    assert host_fraction == ours.logger.name_to_value["train/clip_fraction"] > 0.7
    active = ours.logger.name_to_value["rgpo/active_clip_fraction"]
    assert 0.3 * host_fraction < active < 0.7 * host_fraction


def test_other_recipes_differ_from_ppo_on_the_same_data():
    shift = np.random.default_rng(0).normal(size=(128, 1))
    runs = {
        name: update(GatedPPO("MlpPolicy", "CartPole-v1", recipe=name, **SHORT), shift)
        for name in ("ppo", "rgpo-gate", "rgpo", "cispo", "bapo", "truly-ppo", "dppo-tv")
    }
    for name, found in runs.items():
        assert torch.isfinite(found).all(), name
        others = [o for other, o in runs.items() if other != name]
        assert all((found - o).abs().max() > 1e-5 for o in others), name


def test_one_log_ratio_of_200_breaks_sb3s_gradient_and_not_ours():
    shift = np.zeros((128, 1))
    shift[5] = 200.0
    for recipe in ("ppo", "rgpo", "cispo"):
        ours = GatedPPO("MlpPolicy", "CartPole-v1", recipe=recipe, **SHORT)
        assert torch.isfinite(update(ours, shift)).all(), recipe
        assert ours.logger.name_to_value["rgpo/ratio_max"] > 1e38  # told as it is
    host = PPO("MlpPolicy", "CartPole-v1", **SHORT)
    with pytest.raises(ValueError, match="nan"):  # torch refuses the distribution of NaN logits
        update(host, shift)


def test_the_kl_penalty_holds_the_policy_and_adapts():
    hard = {"learning_rate": 0.01, "n_epochs": 10, "n_steps": 256, "seed": 0}

    def kl(**options):
        model = GatedPPO("MlpPolicy", "CartPole-v1", recipe="rgpo", recipe_options=options, **hard)
        model.learn(256)
        return model.logger.name_to_value["rgpo/kl"], model.recipe.kl

    free, none = kl(kl_coefficient=0)
    held, fixed = kl(kl_coefficient=100.0, kl_target=None)
    assert none is None
    assert fixed.coefficient == 100.0
    assert held < 0.2 * free
    spiked, adapted = kl(kl_coefficient=0.5, kl_target=held / 10)
    assert spiked > 1.5 * held / 10
    assert adapted.coefficient == 1.0


def test_a_saved_run_continues_as_if_it_had_not_stopped(tmp_path):
    model = GatedPPO("MlpPolicy", "CartPole-v1", recipe_options={"sharpness": 7.0}, **SHORT)
    model.learn(512)
    model.save(tmp_path / "run")
    loaded = GatedPPO.load(tmp_path / "run", env=gym.make("CartPole-v1"))
    assert loaded.recipe == model.recipe
    assert loaded.recipe.objective.sharpness == 7.0
    assert loaded.recipe.kl.coefficient != 1.0  # it has adapted, and was kept
    shift = np.random.default_rng(0).normal(size=(128, 1))
    assert torch.equal(update(model, shift), update(loaded, shift))


def test_callbacks_end_a_run():
    model = GatedPPO("MlpPolicy", "CartPole-v1", **SHORT)
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=9))
    assert 8 <= len(model.ep_info_buffer) <= 9
    assert model.num_timesteps < 2000


def test_rgpo_learns_cartpole():
    settings = {"n_steps": 256, "n_epochs": 5, "learning_rate": 2e-3, "seed": 0}
    model = GatedPPO("MlpPolicy", "CartPole-v1", recipe="rgpo", **settings).learn(256)
    first = np.mean([episode["r"] for episode in model.ep_info_buffer])
    model.learn(3500, reset_num_timesteps=False)
    last = np.mean([episode["r"] for episode in list(model.ep_info_buffer)[-10:]])
    assert first < 40
    assert last > 2 * first


def test_the_readmes_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run_example("README.md", "rgpo.adapters.sb3")["model"]
    assert model.num_timesteps >= 10_000
    assert (tmp_path / "cartpole.zip").exists()


class Spaces(gym.Env):
    """Random observations; for actions of any space."""

    def __init__(self, action_space):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,)), action_space

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):  # noqa: ARG002
        return self.observation_space.sample(), float(self.np_random.normal()), False, False, {}


@pytest.mark.parametrize(
    ("space", "extra"),
    [
        (spaces.MultiDiscrete([3, 2]), {}),
        (spaces.MultiBinary(4), {}),
        (spaces.Box(-1, 1, (2,)), {"use_sde": True}),
    ],
    ids=["MultiDiscrete", "MultiBinary", "gSDE"],
)
def test_every_action_space_of_sb3(space, extra):
    runs = []
    for make in (PPO, partial(GatedPPO, recipe="ppo"), partial(GatedPPO, recipe="rgpo")):
        env = Spaces(space)
        env.action_space.seed(0)
        env.observation_space.seed(0)
        runs.append(make("MlpPolicy", env, **SHORT, **extra).learn(256))
    host, ours, gated = runs
    assert torch.equal(parameters(host), parameters(ours))
    assert gated.logger.name_to_value["rgpo/kl"] > 0


@pytest.mark.parametrize(
    ("env", "recipe", "options", "told"),
    [
        ("CartPole-v1", "rgpo-dual-product", {}, "reference_log_ratio.*language"),
        ("CartPole-v1", "decoupled-ppo", {}, "proximal_log_ratio.*staleness"),
        ("CartPole-v1", "bpo", {}, "median_advantage.*rgpo train"),
        ("Pendulum-v1", "dppo-tv", {}, "log_prob.*discrete"),
        ("CartPole-v1", "gspo", {}, "sequence"),
        ("CartPole-v1", "trpo", {}, "natural-gradient steps"),
        ("CartPole-v1", "rgqo", {}, "did you mean"),
        ("CartPole-v1", "rgpo", {"clip_high": 0.1}, "no hyper-parameter 'clip_high'"),
    ],
)
def test_what_sb3_cannot_feed_is_refused(env, recipe, options, told):
    with pytest.raises(RgpoError, match=told):
        GatedPPO("MlpPolicy", env, recipe=recipe, recipe_options=options)


def test_clip_range_is_refused():
    with pytest.raises(RgpoError, match="recipe_options"):
        GatedPPO("MlpPolicy", "CartPole-v1", clip_range=0.1)


@pytest.mark.parametrize(("found", "told"), [("2.7.0", "2.7.1"), ("2.10.0", "2.10.0 is installed")])
def test_other_versions_are_refused_at_import(monkeypatch, found, told):
    monkeypatch.setattr(adapters, "version", lambda _: found)
    with pytest.raises(ImportError, match=told):
        importlib.reload(sb3)


def test_a_missing_host_is_told_at_import(monkeypatch):
    def missing(package):
        raise adapters.PackageNotFoundError(package)

    monkeypatch.setattr(adapters, "version", missing)
    with pytest.raises(ImportError, match=r"needs stable_baselines3.*rgpo\[sb3\]"):
        importlib.reload(sb3)
