"""The fast learner computes what the plain one does, for every recipe that control can run."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, PlainLearner, Schedule
from rgpo.control.networks import ActorCritic
from rgpo.core import recipes

OBSERVATION, SAMPLES = 5, 128
SPACES = {
    "box": gym.spaces.Box(-1, 1, (3,)),
    "discrete": gym.spaces.Discrete(4),
}
CONTROL = [
    r.name
    for r in recipes.recipes()
    if r.level == "token"
    and r.objective.scope in ("element", "batch")
    and not {"reference_log_ratio", "median_advantage"} & set(r.objective.needs)
    and r.step == "gradient"
]
BASE = TrainConfig(
    num_envs=4, rollout_steps=32, minibatch_size=32, epochs=3, hidden=(16, 16), learning_rate=3e-3
)


def learners(space: str, configs: list[TrainConfig]):
    """Plain and fast, from the same initial parameters."""
    distribution = distribution_for(SPACES[space], squash=configs[0].squash)
    shapes = {"vector": (OBSERVATION,)}
    chosen = [c.resolve() for c in configs]
    made = []
    for kind in (PlainLearner, FastLearner):
        policies = [ActorCritic(shapes, distribution, c, c.seed) for c in configs]
        made.append(kind(policies, chosen, distribution, configs))
    return *made, distribution


def make_batch(learner, distribution, seed: int) -> Batch:
    """A rollout of the learner's own policy, with some dummy steps that hold rubbish."""
    runs, rng = len(learner.policies), np.random.default_rng(seed)
    observation = torch.from_numpy(
        rng.standard_normal((runs, SAMPLES, OBSERVATION), dtype=np.float32)
    )
    parameters, value = learner.evaluate({"vector": observation})
    shape = (runs, SAMPLES, distribution.noise_size)
    noise = rng.standard_normal(shape) if distribution.noise == "normal" else rng.random(shape)
    action = distribution.sample(parameters, torch.from_numpy(noise.astype(np.float32)))
    mask = torch.from_numpy(rng.random((runs, SAMPLES)) < 0.9)
    advantage = torch.from_numpy(rng.standard_normal((runs, SAMPLES), dtype=np.float32))
    return Batch(
        observation={"vector": observation},
        action=action,
        parameters=parameters,
        log_prob=distribution.log_prob(parameters, action),
        proximal_log_prob=distribution.log_prob(parameters + 0.05, action),
        advantage=torch.where(mask, advantage, 1e6),
        returns=torch.where(mask, value + advantage, -1e6),
        value=value,
        mask=mask,
    )


def flat(learner, run: int) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policies[run].parameters()])


def assert_equal_after_updates(space: str, configs: list[TrainConfig], updates: int = 3) -> None:
    plain, fast, distribution = learners(space, configs)
    before = flat(plain, 0).clone()
    order = np.random.default_rng(7)
    for update in range(updates):
        batch = make_batch(plain, distribution, update)
        shuffles = np.stack(
            [
                np.stack([order.permutation(SAMPLES) for _ in range(configs[0].epochs)])
                for _ in configs
            ]
        )
        penalties = [c.resolve().kl for c in configs]
        forward, reverse = (
            np.array([0.0 if k is None or k.direction != way else k.coefficient for k in penalties])
            for way in ("forward", "reverse")
        )
        schedule = Schedule(np.array([c.learning_rate for c in configs]), forward, reverse)
        told = [learner.update(batch, shuffles, schedule) for learner in (plain, fast)]
        for key in told[0]:
            np.testing.assert_allclose(told[0][key], told[1][key], rtol=2e-3, err_msg=key)
        for run in range(len(configs)):
            torch.testing.assert_close(flat(plain, run), flat(fast, run), rtol=0, atol=1e-5)
    assert (flat(plain, 0) - before).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", CONTROL)
@pytest.mark.parametrize("space", SPACES)
def test_fast_equals_plain_for_every_recipe(space, recipe):
    if space == "box" and "log_prob" in recipes.get(recipe).objective.needs:
        pytest.skip("needs the probability of a discrete action")
    assert_equal_after_updates(space, [dataclasses.replace(BASE, recipe=recipe)])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "change",
    [
        {"entropy_coefficient": 0.05},
        {"value_clip": 0.1},
        {"max_grad_norm": 0.0},
        {"target_kl": 1e-3},
        {"activation": "relu"},
        {"hidden": (16,)},
        {"normalize_advantages": False},
        {"set": ("kl_coefficient=3", "kl_target=0.01")},
        {"squash": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fast_equals_plain_for_every_option(space, change):
    if change.get("squash") and space != "box":
        pytest.skip("only continuous actions are squashed")
    assert_equal_after_updates(space, [dataclasses.replace(BASE, **change)])


@pytest.mark.parametrize("space", SPACES)
def test_runs_side_by_side_equal_runs_alone(space):
    """Four recipes, learning rates and KL limits in one matrix, each as if it were alone."""
    configs = [
        dataclasses.replace(
            BASE, recipe=name, seed=i, learning_rate=1e-3 * (i + 1), target_kl=0.01 * (i + 1)
        )
        for i, name in enumerate(["rgpo", "rgpo", "ppo", "gipo"])
    ]
    assert_equal_after_updates(space, configs)


def test_compiled_equals_eager_and_one_graph_serves_every_update():
    torch.compiler.reset()
    counters.clear()
    config = dataclasses.replace(BASE, compile=True)
    assert_equal_after_updates("box", [config], updates=2)
    assert counters["stats"]["unique_graphs"] == 1


def test_target_kl_ends_an_update_early_for_one_run_only():
    eager = dataclasses.replace(BASE, recipe="importance", learning_rate=0.03)
    configs = [eager, dataclasses.replace(eager, target_kl=1e-3)]
    _, fast, distribution = learners("box", configs)
    batch = make_batch(fast, distribution, 0)
    order = np.tile(np.arange(SAMPLES), (2, BASE.epochs, 1))
    schedule = Schedule(np.array([0.03, 0.03]), np.zeros(2), np.zeros(2))
    taken = fast.update(batch, order, schedule)["optimizer_steps"]
    assert taken[0] == BASE.epochs * SAMPLES / BASE.minibatch_size
    assert 0 < taken[1] < taken[0]


def test_a_diverging_run_does_not_touch_its_neighbour():
    configs = [dataclasses.replace(BASE, seed=s) for s in (0, 1)]
    _, fast, distribution = learners("box", configs)
    _, alone, _ = learners("box", configs[1:])
    batch = make_batch(fast, distribution, 0)
    batch.advantage[0] = float("nan")
    order = np.tile(np.arange(SAMPLES), (2, BASE.epochs, 1))
    schedule = Schedule(np.array([3e-3, 3e-3]), np.ones(2), np.zeros(2))
    norms = fast.update(batch, order, schedule)["gradient_norm"]
    single = Batch(
        {"vector": batch.observation["vector"][1:]},
        **{k: v[1:] for k, v in vars(batch).items() if k != "observation"},
    )
    alone.update(single, order[1:], Schedule(np.array([3e-3]), np.ones(1), np.zeros(1)))
    assert np.isnan(norms[0])
    assert np.isfinite(norms[1])
    torch.testing.assert_close(flat(fast, 1), flat(alone, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_either_learner_continues_from_the_others_state(space):
    plain, fast, distribution = learners(space, [BASE])
    batch = make_batch(plain, distribution, 0)
    order = np.tile(np.arange(SAMPLES), (1, BASE.epochs, 1))
    schedule = Schedule(np.array([3e-3]), np.zeros(1), np.zeros(1))
    fast.update(batch, order, schedule)
    saved = {k: v.clone() for k, v in fast.state(0).items()}
    plain.restore(0, saved)
    assert set(plain.state(0)) == set(saved)
    again, _, _ = learners(space, [BASE])
    again.restore(0, plain.state(0))
    for learner in (fast, plain, again):
        learner.update(batch, order, schedule)
    torch.testing.assert_close(flat(fast, 0), flat(plain, 0), rtol=0, atol=1e-5)
    assert torch.equal(flat(plain, 0), flat(again, 0))


def test_acting_in_numpy_is_acting_in_torch():
    for space in SPACES:
        plain, fast, distribution = learners(space, [BASE, dataclasses.replace(BASE, seed=1)])
        rng = np.random.default_rng(0)
        observation = {"vector": rng.standard_normal((2, 8, OBSERVATION), dtype=np.float32)}
        noise = rng.random((2, 8, distribution.noise_size), dtype=np.float32)
        np.testing.assert_allclose(
            plain.act(observation, noise), fast.act(observation, noise), rtol=1e-5, atol=1e-6
        )


def test_a_clip_normalized_step_is_ppos_over_the_norm_of_what_was_clipped():
    """Below the floor of 0.1 small gradients are ten times PPO's; beyond it A's scale drops out."""
    norms = {}
    for name, scale in (
        ("ppo", 1e-2),
        ("s-ppo-variant", 1e-2),
        ("s-ppo-variant", 1e4),
        ("s-ppo-variant", 1e5),
    ):
        config = dataclasses.replace(
            BASE,
            recipe=name,
            epochs=1,
            max_grad_norm=0.0,
            normalize_advantages=False,
            value_coefficient=0.0,
        )
        plain, _, distribution = learners("box", [config])
        batch = make_batch(plain, distribution, 0)
        batch.log_prob = batch.log_prob - 0.5 * batch.advantage.sign()  # the clip's flat side
        batch.log_prob[:, ::2] += 0.5 * batch.advantage.sign()[:, ::2]
        batch.advantage = batch.advantage * scale
        order = np.arange(SAMPLES).reshape(1, 1, -1)
        schedule = Schedule(np.zeros(1), np.zeros(1), np.zeros(1))
        norms[name, scale] = float(plain.update(batch, order, schedule)["gradient_norm"][0])
    assert norms["s-ppo-variant", 1e-2] == pytest.approx(10 * norms["ppo", 1e-2], rel=1e-5)
    assert norms["s-ppo-variant", 1e5] == pytest.approx(norms["s-ppo-variant", 1e4], rel=1e-3)
