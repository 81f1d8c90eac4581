"""rsl_rl: `GatedPPO` against rsl_rl's own PPO, on MuJoCo's inverted pendulum."""

import importlib

import gymnasium as gym
import pytest
import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from rgpo.adapters import common as adapters
from rgpo.adapters import rsl_rl as adapter
from rgpo.errors import RgpoError

HOST, OURS = "rsl_rl.algorithms:PPO", "rgpo.adapters.rsl_rl:GatedPPO"


class Pendulum(VecEnv):
    """Gymnasium's vector environment as rsl_rl wants it."""

    def __init__(self, num_envs=8):
        self.envs = gym.make_vec(
            "InvertedPendulum-v5",
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP},
        )
        self.num_envs, self.num_actions, self.max_episode_length = num_envs, 1, 1000
        self.device, self.cfg, self.returns = "cpu", {}, []
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self.obs, _ = self.envs.reset(seed=0)
        self.sums = torch.zeros(num_envs)

    def get_observations(self):
        return TensorDict({"policy": torch.as_tensor(self.obs).float()}, [self.num_envs])

    def step(self, actions):
        self.obs, reward, terminated, truncated, _ = self.envs.step(actions.clamp(-3, 3).numpy())
        dones = torch.as_tensor(terminated | truncated)
        self.sums += torch.as_tensor(reward).float()
        self.returns += self.sums[dones].tolist()
        self.sums[dones] = 0
        extras = {"time_outs": torch.as_tensor(truncated)}
        return self.get_observations(), torch.as_tensor(reward).float(), dones.long(), extras


def runner(class_name, **algorithm):
    torch.manual_seed(0)
    model = {"class_name": "rsl_rl.models:MLPModel", "hidden_dims": [32, 32], "activation": "tanh"}
    gaussian = {"class_name": "rsl_rl.modules:GaussianDistribution", "init_std": 1.0}
    settings = {
        "class_name": class_name,
        "num_learning_epochs": 4,
        "num_mini_batches": 4,
        "learning_rate": 1e-3,
        "schedule": "fixed",
    }
    config = {
        "num_steps_per_env": 32,
        "save_interval": 1000,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": model | {"distribution_cfg": gaussian},
        "critic": dict(model),
        "algorithm": settings | algorithm,
        "multi_gpu": None,
    }
    return OnPolicyRunner(Pendulum(), config)


def parameters(algorithm):
    models = (algorithm.actor, algorithm.critic)
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def update(found, shift=None):
    """One update on a real rollout, its behaviour log-probs shifted by `shift` (T, E, 1)."""
    torch.manual_seed(1)
    algorithm, env = found.alg, found.env
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(32):
            obs, reward, dones, extras = env.step(algorithm.act(obs))
            algorithm.process_env_step(obs, reward, dones, extras)
        algorithm.compute_returns(obs)
        if shift is not None:
            algorithm.storage.actions_log_prob -= shift
    return algorithm.update()


def shift(seed=0):
    return torch.randn(32, 8, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("extra", [{}, {"schedule": "adaptive", "use_clipped_value_loss": False}])
def test_recipe_ppo_is_rsl_rls_own_run_bit_for_bit(extra):
    runs = [runner(HOST, **extra), runner(OURS, recipe="ppo", **extra)]
    losses = []
    for found in runs:
        torch.manual_seed(0)
        found.learn(4)
        losses.append(update(found))
    assert torch.equal(*(parameters(found.alg) for found in runs))
    for name, number in losses[0].items():
        assert losses[1][name] == number, name


def test_parity_with_ratios_far_from_one():
    """Bit for bit: mini-batches of 64, a power of 2, so that r A / B rounds alike in any order."""
    host, ours = runner(HOST), runner(OURS, recipe="ppo")
    update(host, shift())
    found = update(ours, shift())
    assert torch.equal(parameters(host.alg), parameters(ours.alg))
    assert 0.2 < found["rgpo/active_clip_fraction"] < 0.8
    assert found["rgpo/ratio_max"] > 3


def test_recipes_differ_on_the_same_data():
    results = []
    for name in ("ppo", "rgpo-gate", "rgpo", "cispo", "bapo", "truly-ppo"):
        found = runner(OURS, recipe=name)
        update(found, shift())
        results.append(parameters(found.alg))
        assert torch.isfinite(results[-1]).all(), name
        assert all((results[-1] - other).abs().max() > 1e-5 for other in results[:-1]), name


def test_one_log_ratio_of_200_breaks_rsl_rls_parameters_and_not_ours():
    extreme = torch.zeros(32, 8, 1)
    extreme[3, 2] = 200.0
    for name in ("ppo", "rgpo", "cispo"):
        ours = runner(OURS, recipe=name)
        found = update(ours, extreme)
        assert torch.isfinite(parameters(ours.alg)).all(), name
        assert found["rgpo/ratio_max"] > 1e30
    host = runner(HOST)
    with pytest.raises(RuntimeError, match="std >= 0"):  # what torch says to a NaN
        update(host, extreme)


def test_the_kl_penalty_holds_the_policy_adapts_and_is_saved():
    hard = {"learning_rate": 0.01, "num_learning_epochs": 8}
    free = update(runner(OURS, recipe_options={"kl_coefficient": 0}, **hard))
    assert "rgpo/kl" not in free
    found = runner(OURS, recipe_options={"kl_coefficient": 100.0}, **hard)
    held = update(found)
    assert held["rgpo/kl_k3"] < 0.3 * free["rgpo/kl_k3"]
    assert found.alg.recipe.kl.coefficient != 100.0
    other = runner(OURS, **hard)
    other.alg.load(found.alg.save(), None, strict=True)
    assert other.alg.recipe == found.alg.recipe
    assert torch.equal(parameters(other.alg), parameters(found.alg))


def test_rgpo_balances_the_pendulum():
    found = runner(OURS, recipe="rgpo", learning_rate=3e-3)
    torch.manual_seed(0)
    found.learn(40)
    returns = found.env.returns
    first, last = sum(returns[:20]) / 20, sum(returns[-20:]) / 20
    assert first < 15
    assert last > 3 * first


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("dppo-tv", "log_prob.*discrete"),
        ("rgpo-dual-product", "reference_log_ratio.*language"),
        ("gspo", "sequence"),
        ("r2vpo-dual-variant", "changes from update to update"),
    ],
)
def test_what_rsl_rl_cannot_feed_is_refused(recipe, told):
    with pytest.raises(RgpoError, match=told):
        runner(OURS, recipe=recipe)


@pytest.mark.parametrize("found", ["5.4.1", "5.6.0"])
def test_other_versions_are_refused_at_import(monkeypatch, found):
    monkeypatch.setattr(adapters, "version", lambda _: found)
    with pytest.raises(ImportError, match=found):
        importlib.reload(adapter)
