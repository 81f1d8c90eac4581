"""Total variation of action distributions, certificates of R runs, certified steps."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from rgpo.control.certify import (
    HALVINGS,
    PARTS,
    certified_fraction,
    certify_runs,
    confidence_per_candidate,
    place,
    policy_parameters,
    total_variation,
)
from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Bernoulli, Categorical, Normal
from rgpo.control.networks import ActorCritic
from rgpo.control.train import Trainer
from rgpo.core import recipes
from rgpo.core.certificate import categorical_tv, certify
from rgpo.core.objectives.rgpo import RGPO
from rgpo.errors import RgpoError
from rgpo.studies.tabular import random_problems, solve

close = torch.testing.assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_total_variation_is_exact_for_one_categorical():
    distribution = Categorical((4,), (0,), (), "int64")
    old, new = torch.randn(2, 100, 4, generator=generator())
    found = total_variation(distribution, old, new, distribution.kl(old, new))
    close(found, (torch.softmax(old, -1) - torch.softmax(new, -1)).abs().sum(-1) / 2)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_total_variation_bounds_that_of_products(scale):
    """Against the enumeration of all joint actions."""
    draw = generator(1)
    several, bits = Categorical((3, 2, 4), (0,) * 3, (3,), "int64"), Bernoulli((5,), "int8")
    for distribution in (several, bits):
        old = torch.randn(200, distribution.parameters, generator=draw, dtype=torch.float64)
        new = old + scale * torch.randn(old.shape, generator=draw, dtype=torch.float64)
        sizes = distribution.sizes if distribution is several else (2,) * 5
        actions = torch.tensor(list(itertools.product(*(range(n) for n in sizes))))
        joint = [
            torch.stack([distribution.log_prob(p, a.expand(200, -1)) for a in actions]).exp()
            for p in (old, new)
        ]
        exact = (joint[0] - joint[1]).abs().sum(0) / 2
        found = total_variation(distribution, old, new, distribution.kl(old, new))
        assert (exact <= found + 1e-9).all()
        assert (found <= 3 * exact + 1e-9).all() or scale > 1


def test_total_variation_bounds_that_of_normals():
    """Against 200,000 samples of E_old[(1 - r)^+]."""
    distribution = Normal((-1.0,) * 3, (1.0,) * 3, (3,), "float32")
    draw = generator(2)
    for scale in (0.05, 0.3, 1.0):
        old = torch.randn(6, generator=draw) * 0.3
        new = old + scale * torch.randn(6, generator=draw)
        action = distribution.sample(old, torch.randn(200_000, 3, generator=draw))
        d = distribution.log_prob(new, action) - distribution.log_prob(old, action)
        exact = float(torch.clamp(1 - d.exp(), min=0).mean())
        found = float(total_variation(distribution, old, new, distribution.kl(old, new)))
        assert exact - 0.005 <= found <= 1


def test_runs_of_different_recipes_are_certified_each_with_its_own_gate():
    draw = generator(3)
    names = ("rgpo", "rgpo-gate", "ppo", "sapo", "sapo", "rgpo")
    objectives = [recipes.get(name).objective for name in names]
    d, advantage = 0.2 * torch.randn(2, 6, 300, generator=draw)
    tv, mask = torch.full_like(d, 0.1), torch.rand(6, 300, generator=draw) < 0.8
    found = certify_runs(objectives, d, advantage, tv, mask, gamma=0.9)
    for r, objective in enumerate(objectives):
        alone = certify(objective, d[r], advantage[r], mask[r], tv=tv[r], gamma=0.9)
        close(found["certificate"][r], alone.bound)
        close(found["certificate_gate"][r], alone.gate)
    assert certify_runs(objectives, d, advantage, tv, mask, gamma=1.0) == {}


def test_the_fraction_is_the_largest_power_of_two_that_keeps_its_promise():
    limits = torch.tensor([2.0, 1.0, 0.6, 0.25, 1e-3, 1e-9, float("nan")]).double()
    asked = []

    def promise(fraction):
        asked.append(fraction.clone())
        return limits - fraction

    found = certified_fraction(promise, 7)
    assert found.tolist() == [1, 1, 0.5, 0.25, 2.0**-10, 0, 0]
    assert len(asked) == HALVINGS + 1
    assert certified_fraction(torch.ones_like, 3).tolist() == [1, 1, 1]
    assert 1 - confidence_per_candidate(0.9) == pytest.approx(0.1 / (HALVINGS + 1))


def test_policies_are_put_on_the_line_and_critics_are_left_alone():
    distribution = Normal((-1.0,), (1.0,), (1,), "float32")
    config = TrainConfig(hidden=(8, 8))
    policies = [ActorCritic({"vector": (3,)}, distribution, config, seed) for seed in range(3)]
    old = policy_parameters(policies)
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator(4)))
        policies[0].actor[0].weight.fill_(float("nan"))
    new = policy_parameters(policies)
    critics = [{k: v.clone() for k, v in p.critic.state_dict().items()} for p in policies]
    place(policies, old, new, torch.tensor([0.0, 0.25, 1.0]))
    for name in old[0]:
        own = [dict(policy.named_parameters())[name] for policy in policies]
        assert torch.equal(own[0], old[0][name])
        close(own[1].detach(), 0.75 * old[1][name] + 0.25 * new[1][name])
        assert torch.equal(own[2], new[2][name])
    for policy, critic in zip(policies, critics, strict=True):
        for key, tensor in policy.critic.state_dict().items():
            assert torch.equal(tensor, critic[key])


def returns_of_updates(gamma: float, seeds: int, samples: int, updates: int, *, certified=True):
    """Exact returns (updates + 1, seeds) and accepted fractions (updates, seeds).

    Softmax tables on random problems of 3 states and 3 actions. Every update is a noisy
    natural-gradient step; `certified`: shortened on a batch that it was not made from.
    """
    draw = generator(17)
    problems = random_problems(seeds, 3, 3, gamma, draw)
    logits = torch.randn(seeds, 3, 3, dtype=torch.float64, generator=draw)
    rows = torch.arange(seeds)[:, None]
    returns, fractions = [], []
    for _ in range(updates):
        old = torch.log_softmax(logits, -1)
        exact = solve(problems, old.exp())
        returns.append(exact.performance)
        largest = exact.advantage.abs().amax((1, 2))
        step = exact.advantage / largest[:, None, None]
        step = step + 0.6 * torch.randn(step.shape, dtype=torch.float64, generator=draw)
        state = torch.multinomial(exact.visits, samples, replacement=True, generator=draw)
        chances = old.exp()[rows, state].flatten(0, 1)
        action = torch.multinomial(chances, 1, generator=draw).view(seeds, samples)

        def promise(fraction, old=old, step=step, exact=exact, state=state, action=action):
            new = torch.log_softmax(old + fraction[:, None, None] * step, -1)
            tv = categorical_tv(old, new)
            return certify(
                RGPO(4.0),
                (new - old)[rows, state, action],
                exact.advantage[rows, state, action],
                gamma=gamma,
                tv=tv.gather(1, state),
                confidence=confidence_per_candidate(0.99),
                max_advantage=exact.advantage.abs().amax((1, 2)),
                max_tv=tv.amax(1),
            ).bound

        whole = torch.ones(seeds, dtype=torch.float64)
        fractions.append(certified_fraction(promise, seeds) if certified else whole)
        logits = old + fractions[-1][:, None, None] * step
    returns.append(solve(problems, torch.softmax(logits, -1)).performance)
    return torch.stack(returns), torch.stack(fractions)


@pytest.mark.parametrize(("gamma", "moving"), [(0.0, 0.5), (0.5, 0.2)])
def test_certified_updates_never_lower_the_return(gamma, moving):
    """200 random problems, exact returns; and the guarantee is not one of standing still."""
    returns, fractions = returns_of_updates(gamma, seeds=200, samples=4000, updates=4)
    assert (returns[1:] >= returns[:-1] - 1e-12).all()
    assert (fractions > 0).double().mean() > moving
    assert (returns[-1] > returns[0] + 1e-9).double().mean() > moving


def test_the_same_updates_without_a_certificate_do_lower_it():
    returns, _ = returns_of_updates(0.5, seeds=200, samples=2, updates=4, certified=False)
    lowered = (returns[1:] < returns[:-1]).double().mean()
    assert lowered > 0.05


# ---- in training ----------------------------------------------------------------------------

SMALL = {"env": "CartPole-v1", "num_envs": 4, "rollout_steps": 64, "minibatch_size": 64}


@pytest.mark.parametrize("learner", ["plain", "fast"])
def test_a_row_holds_the_certificate_of_its_update(learner):
    configs = [
        TrainConfig(**SMALL, recipe=recipe, seed=1, learner=learner, backend="gymnasium")
        for recipe in ("rgpo", "ppo")
    ]
    for row in Trainer(configs).step():
        parts = [row[f"certificate_{name}"] for name in ("surrogate", "gate", "shift", "interval")]
        assert row["certificate"] == pytest.approx(parts[0] - sum(parts[1:]))
        assert parts[2] > 0
        assert parts[3] > 0
        assert row["accepted_step"] == 1


def test_without_a_discount_there_is_no_certificate():
    (row,) = Trainer([TrainConfig(**SMALL, gamma=1.0)]).step()
    assert not PARTS.keys() & row.keys()


@pytest.mark.parametrize("learner", ["plain", "fast"])
def test_certified_updates_at_a_long_discount_are_null_steps_and_the_critic_learns(learner):
    config = TrainConfig(**SMALL, certified=True, learner=learner, backend="gymnasium")
    trainer = Trainer([config])
    (policy,) = trainer.learner.policies
    old = {k: v.clone() for k, v in policy.state_dict().items()}
    (row,) = trainer.step()
    new = policy.state_dict()
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor) == (not name.startswith("critic.")), name
    assert row["accepted_step"] == row["certificate"] == 0
    assert row["kl"] < 1e-6
    assert row["explained_variance"] is not None


class Shortest(gym.Env):
    """One step, +1 for the first of two actions and -1 for the second."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0 - 2 * action, True, False, {}


gym.register("Shortest-v0", entry_point=f"{__name__}:Shortest")


@pytest.mark.parametrize("learner", ["plain", "fast"])
def test_certified_updates_move_where_something_can_be_guaranteed(learner):
    """Two runs of one-step episodes: the return rises, and every row keeps what it promises."""
    configs = [
        TrainConfig(
            env="Shortest-v0",
            recipe="rgpo-gate",
            seed=seed,
            gamma=0.0,
            num_envs=8,
            rollout_steps=256,
            minibatch_size=256,
            normalize_rewards=False,
            normalize_observations=False,  # their statistics would move the policy as well
            certified=True,
            learner=learner,
        )
        for seed in range(2)
    ]
    trainer = Trainer(configs)
    rows = [trainer.step() for _ in range(4)]
    for before, after in itertools.pairwise(rows):
        for old, new in zip(before, after, strict=True):
            assert old["certificate"] >= 0
            assert new["return"] >= old["return"] + old["certificate"] - 0.08  # 1,024 episodes
    assert all(row["accepted_step"] > 0 for row in rows[0])
    assert all(row["return"] > 0.5 for row in rows[-1])


def test_certified_updates_that_cannot_be_are_refused_and_the_hopeless_ones_told():
    with pytest.raises(RgpoError, match="gamma 1"):
        TrainConfig(certified=True, gamma=1.0)
    with pytest.raises(RgpoError, match="staleness"):
        TrainConfig(certified=True, staleness=2)
    assert any("null step" in w for w in TrainConfig(certified=True).warnings())
    assert any("normalize" in w for w in TrainConfig(certified=True, gamma=0.5).warnings())
    quiet = TrainConfig(certified=True, gamma=0.5, normalize_observations=False)
    assert not quiet.warnings()
