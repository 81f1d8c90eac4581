"""skrl: `GatedPPO` against skrl's own PPO, on CartPole."""

import importlib
from functools import partial

import gymnasium as gym
import pytest
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.agents.torch.ppo.ppo import compute_gae
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
from skrl.utils import set_seed
from torch import nn

from rgpo.adapters import common as adapters
from rgpo.adapters import skrl as adapter
from rgpo.adapters.skrl import GatedPPO
from rgpo.errors import RgpoError


class Net(Model):
    def __init__(self, outputs, observation_space, action_space):
        Model.__init__(
            self, observation_space=observation_space, action_space=action_space, device="cpu"
        )
        inputs = observation_space.shape[0]
        self.net = nn.Sequential(
            nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs)
        )

    def compute(self, inputs, role):  # noqa: ARG002
        return self.net(inputs["observations"]), {}


class Discrete(CategoricalMixin, Net):
    def __init__(self, observation_space, action_space):
        Net.__init__(self, int(action_space.n), observation_space, action_space)
        CategoricalMixin.__init__(self)


class Gaussian(GaussianMixin, Net):
    def __init__(self, observation_space, action_space):
        Net.__init__(self, action_space.shape[0], observation_space, action_space)
        GaussianMixin.__init__(self)
        self.log_std = nn.Parameter(torch.zeros(action_space.shape[0]))

    def compute(self, inputs, role):  # noqa: ARG002
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Net):
    def __init__(self, observation_space, action_space):
        Net.__init__(self, 1, observation_space, action_space)
        DeterministicMixin.__init__(self)


def agent(make, env_id="CartPole-v1", **settings):
    set_seed(0)
    env = wrap_env(gym.make_vec(env_id, 4, vectorization_mode="sync"), verbose=False)
    env.reset()
    policy = Discrete if env_id == "CartPole-v1" else Gaussian
    spaces = (env.observation_space, env.action_space)
    config = {"rollouts": 64, "learning_epochs": 4, "mini_batches": 4, "learning_rate": 1e-3}
    off = {"write_interval": 0, "checkpoint_interval": 0}
    made = make(
        models={"policy": policy(*spaces), "value": Value(*spaces)},
        memory=RandomMemory(memory_size=64, num_envs=4, device="cpu"),
        observation_space=spaces[0],
        action_space=spaces[1],
        device="cpu",
        cfg=PPO_CFG(**config | settings, experiment=off),
    )
    return made, env


def train(make, timesteps, **settings):
    made, env = agent(make, **settings)
    run(made, env, timesteps)
    return made


def run(made, env, timesteps):
    config = SequentialTrainerCfg(
        timesteps=timesteps,
        headless=True,
        disable_progressbar=True,
        close_environment_at_exit=False,
    )
    SequentialTrainer(cfg=config, env=env, agents=made).train()


def parameters(made):
    return torch.cat(
        [p.detach().flatten() for p in (*made.policy.parameters(), *made.value.parameters())]
    )


def update(made, env, shift):
    """One update on a real rollout whose behaviour log-probs are shifted by `shift` (T, E, 1)."""
    made.init(trainer_cfg=SequentialTrainerCfg())
    made.enable_training_mode(enabled=True)
    obs, _ = env.reset()
    for _ in range(64):
        with torch.no_grad():
            actions, _ = made.act(obs, None, timestep=0, timesteps=1)
            after, reward, terminated, truncated, infos = env.step(actions)
            made.record_transition(
                observations=obs, states=None, actions=actions, rewards=reward,
                next_observations=after, next_states=None, terminated=terminated,
                truncated=truncated, infos=infos, timestep=0, timesteps=1,
            )  # fmt: skip
        obs = after
    made.memory.get_tensor_by_name("log_prob").sub_(shift)
    set_seed(1)
    made.update(timestep=0, timesteps=1)
    return parameters(made)


def shift():
    return torch.randn(64, 4, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("extra", [{}, {"kl_threshold": 0.001, "entropy_loss_scale": 0.01}])
def test_recipe_ppo_is_skrls_own_run_bit_for_bit(env_id, extra):
    host = train(PPO, 256, env_id=env_id, **extra)
    ours = train(partial(GatedPPO, recipe="ppo"), 256, env_id=env_id, **extra)
    before = parameters(agent(PPO, env_id)[0])
    assert not torch.equal(parameters(host), before)
    assert torch.equal(parameters(host), parameters(ours))


def test_parity_with_ratios_far_from_one():
    """Bit for bit: mini-batches of 64, a power of 2, so that r A / B rounds alike in any order."""
    host, ours = (update(*agent(make), shift()) for make in (PPO, partial(GatedPPO, recipe="ppo")))
    assert torch.equal(host, ours)


def test_recipes_differ_on_the_same_data():
    results = []
    for name in ("ppo", "rgpo-gate", "rgpo", "cispo", "bapo", "truly-ppo", "dppo-tv"):
        results.append(update(*agent(partial(GatedPPO, recipe=name)), shift()))
        assert torch.isfinite(results[-1]).all(), name
        assert all((results[-1] - other).abs().max() > 1e-5 for other in results[:-1]), name


def test_one_log_ratio_of_200_breaks_skrls_parameters_and_not_ours():
    extreme = torch.zeros(64, 4, 1)
    extreme[:, 2] = 200.0  # minibatches are drawn with replacement
    for name in ("ppo", "rgpo", "cispo"):
        assert torch.isfinite(update(*agent(partial(GatedPPO, recipe=name)), extreme)).all(), name
    with pytest.raises(RuntimeError, match="nan"):  # torch refuses the distribution of NaN logits
        update(*agent(PPO), extreme)


def test_mixed_precision_scales_the_recipes_loss_too():
    made, env = agent(partial(GatedPPO, recipe="ppo"))
    plain = update(made, env, shift())
    scaled, env = agent(partial(GatedPPO, recipe="ppo"))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.testing.assert_close(update(scaled, env, shift()), plain, rtol=1e-5, atol=1e-6)


def test_the_kl_penalty_holds_the_policy_adapts_and_is_saved(tmp_path):
    hard = {"learning_rate": 0.01, "learning_epochs": 8}

    def measured(**options):
        made, env = agent(partial(GatedPPO, recipe_options=options), **hard)
        update(made, env, torch.zeros(64, 4, 1))
        return made, made.tracking_data["RGPO / kl_k3"][-1]

    _, free = measured(kl_coefficient=0)
    found, held = measured(kl_coefficient=100.0)
    assert held < 0.3 * free
    assert found.recipe.kl.coefficient != 100.0
    found.save(tmp_path / "agent.pt")
    other, _ = agent(GatedPPO, **hard)
    other.load(tmp_path / "agent.pt")
    assert other.recipe == found.recipe
    assert torch.equal(parameters(other), parameters(found))


def test_rgpo_learns_cartpole():
    lengths = []
    made, env = agent(partial(GatedPPO, recipe="rgpo"), learning_rate=3e-3)
    record = made.record_transition

    def count(**step):
        lengths.append((step["terminated"] | step["truncated"]).sum().item())
        record(**step)

    made.record_transition = count
    run(made, env, 64 * 25)
    first, last = 4 * 200 / sum(lengths[:200]), 4 * 200 / max(sum(lengths[-200:]), 1)
    assert first < 40
    assert last > 2 * first


def test_pinned_skrl_lets_advantages_cross_a_truncation():
    """Without `time_limit_bootstrap` (the default) it joins the episode to the next one."""
    zeros, values = torch.zeros(2, 1), torch.tensor([[0.0], [10.0]])
    how = {"rewards": zeros, "values": values, "last_values": torch.zeros(1)}
    ends = {"terminated": zeros.bool(), "truncated": torch.tensor([[True], [False]])}
    leaking, _ = compute_gae(**how, **ends, lambda_coefficient=0.0)
    cut, _ = compute_gae(**how, **ends, lambda_coefficient=0.0, time_limit_bootstrap=True)
    assert leaking[0] == pytest.approx(9.9)  # discount times the value of another episode's start
    assert cut[0] == 0


@pytest.mark.parametrize(
    ("env_id", "recipe", "told"),
    [
        ("Pendulum-v1", "dppo-tv", "log_prob.*discrete"),
        ("CartPole-v1", "rgpo-dual-product", "reference_log_ratio.*language"),
        ("CartPole-v1", "gspo", "sequence"),
        ("CartPole-v1", "r2vpo-dual-variant", "changes from update to update"),
    ],
)
def test_what_skrl_cannot_feed_is_refused(env_id, recipe, told):
    with pytest.raises(RgpoError, match=told):
        agent(partial(GatedPPO, recipe=recipe), env_id)


@pytest.mark.parametrize("found", ["2.0.1", "2.2.0"])
def test_other_versions_are_refused_at_import(monkeypatch, found):
    monkeypatch.setattr(adapters, "version", lambda _: found)
    with pytest.raises(ImportError, match=found):
        importlib.reload(adapter)
