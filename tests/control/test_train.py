"""The training loop: it learns, repeats itself, and a run does not depend on its neighbours."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_environments

from rgpo.control.config import TrainConfig
from rgpo.control.fast import FastLearner
from rgpo.control.learner import PlainLearner
from rgpo.control.train import Trainer
from rgpo.core import recipes
from rgpo.core.diagnostics import has_spread
from rgpo.core.objectives.spo import SPO
from rgpo.errors import RgpoError

TINY = TrainConfig(
    env="CartPole-v1",
    num_envs=2,
    rollout_steps=32,
    minibatch_size=32,
    epochs=2,
    hidden=(16, 16),
    steps=64 * 8,
    backend="gymnasium",
    track=(),
)
TASKS = ("CartPole-v1", "Pendulum-v1")


class Spaces(gym.Env):
    """Random observations of any space for actions of any space, which it checks."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.count += 1
        return self.observation_space.sample(), 1.0, self.count == 5, False, {}


def register(name, **arguments):
    gym.registry.pop(name, None)
    gym.register(name, **arguments)
    return name


def tiny(**changes) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def train(configs, updates):
    """The trainer after some updates, its environments closed, and all rows."""
    trainer = Trainer(configs)
    rows = [trainer.step() for _ in range(updates)]
    trainer.environments.close()
    return trainer, rows


def without_seconds(row):
    return {k: np.nan if v is None else v for k, v in row.items() if not k.startswith("seconds")}


def assert_same_rows(mine, theirs, **tolerance):
    mine, theirs = without_seconds(mine), without_seconds(theirs)
    assert mine.keys() == theirs.keys()
    for key in mine:
        np.testing.assert_allclose(mine[key], theirs[key], err_msg=key, **tolerance)


# ---- learning -----------------------------------------------------------------------------


@pytest.mark.parametrize("learner", ["fast", "plain"])
def test_cart_pole_is_learned(learner):
    config = tiny(
        num_envs=8,
        rollout_steps=64,
        epochs=4,
        minibatch_size=128,
        learning_rate=5e-3,
        steps=16_384,
        learner=learner,
    )
    _, rows = train([config], config.updates)
    returns = [row[0]["return"] for row in rows if row[0]["return"] is not None]
    assert np.mean(returns[:3]) < 40
    assert np.mean(returns[-5:]) > 100


@pytest.mark.parametrize("env", TASKS)
@pytest.mark.parametrize("learner", ["fast", "plain"])
def test_the_seed_determines_everything(env, learner):
    config = tiny(env=env, learner=learner)
    first, rows = train([config], 3)
    second, again = train([config], 3)
    for mine, theirs in zip(rows, again, strict=True):
        assert_same_rows(mine[0], theirs[0], rtol=0)
    for key, tensor in first.learner.state(0).items():
        assert torch.equal(tensor, second.learner.state(0)[key]), key
    other, _ = train([dataclasses.replace(config, seed=1)], 3)
    assert not torch.equal(
        first.learner.state(0)["policy.actor.0.weight"],
        other.learner.state(0)["policy.actor.0.weight"],
    )


def record_orders(trainer):
    orders, update = [], trainer.learner.update

    def recording(batch, order, schedule):
        orders.append(order.copy())
        return update(batch, order, schedule)

    trainer.learner.update = recording
    return orders


@pytest.mark.parametrize("env", TASKS)
def test_a_run_among_others_equals_the_run_alone(env):
    configs = [
        tiny(env=env, recipe=recipe, seed=seed, learning_rate=1e-3 * (seed + 1))
        for seed, recipe in enumerate(["rgpo", "ppo", "gipo", "ppo-kl"])
    ]
    together = Trainer(configs)
    orders = record_orders(together)
    rows = [together.step() for _ in range(3)]
    for i, config in enumerate(configs):
        alone = Trainer([config])
        own_orders = record_orders(alone)
        for number in range(3):
            (row,) = alone.step()
            assert_same_rows(rows[number][i], row, rtol=2e-3, atol=1e-5)
            np.testing.assert_array_equal(orders[number][i], own_orders[number][0])
        state = together.generators[i].bit_generator.state
        assert state == alone.generators[0].bit_generator.state


@pytest.mark.parametrize("learner", ["fast", "plain"])
@pytest.mark.parametrize("env", TASKS)
def test_the_ratio_is_one_when_nothing_is_learned(env, learner):
    _, rows = train([tiny(env=env, learner=learner, learning_rate=1e-30)], 2)
    for (row,) in rows:
        assert not has_spread(torch.tensor(row["ratio_spread"]))
        assert row["kl"] == pytest.approx(0, abs=1e-9)
        assert row["ess"] == pytest.approx(1, abs=1e-6)
        assert row["gate_acceptance"] == pytest.approx(1, abs=1e-4)


def test_trpo_stays_inside_its_ball():
    trainer, rows = train([tiny(env="Pendulum-v1", recipe="trpo", max_kl=0.02)], 4)
    kls = [row["kl"] for (row,) in rows]
    assert isinstance(trainer.learner, PlainLearner)
    assert max(kls) <= 0.02 * (1 + 1e-4)
    assert max(kls) > 0.002


# ---- ends of episodes ---------------------------------------------------------------------


def returns_of_one_rollout(env, rollout_steps):
    """Targets and mask with gamma 0.5, lambda 1, V(s) = 10 count + 1, reward 1 a step."""
    config = tiny(
        env=env,
        num_envs=1,
        rollout_steps=rollout_steps,
        minibatch_size=rollout_steps,
        hidden=(),
        gamma=0.5,
        lam=1.0,
        normalize_observations=False,
        normalize_rewards=False,
    )
    trainer = Trainer([config])
    (policy,) = trainer.learner.policies
    with torch.no_grad():
        policy.critic[0].weight.copy_(torch.tensor([[10.0, 0.0]]))
        policy.critic[0].bias.fill_(1.0)
        policy.actor[0].weight.zero_()
        policy.actor[0].bias.copy_(torch.tensor([100.0, 0.0, 0.0]))  # always action 0
    rollout = trainer._collect()
    batch, _ = trainer._prepare(rollout)
    torch.testing.assert_close(batch.advantage, batch.returns - batch.value)
    return batch.returns[0].tolist(), batch.mask[0].tolist(), rollout


def test_a_termination_does_not_bootstrap():
    toy_environments.register()
    returns, mask, rollout = returns_of_one_rollout("toy/Counter-v0", 5)
    assert returns[:4] == pytest.approx([1.875, 1.75, 1.5, 1])
    assert mask == [True, True, True, True, False]  # the fifth call only reset
    assert rollout.episodes == [[(4.0, 4)]]


def test_a_truncation_bootstraps_from_the_final_observation():
    toy_environments.register()
    env = register("toy/Cut-v0", entry_point=toy_environments.Counter, max_episode_steps=3)
    returns, mask, rollout = returns_of_one_rollout(env, 4)
    assert returns[:3] == pytest.approx([5.625, 9.25, 1 + 0.5 * 31])
    assert mask == [True, True, True, False]
    assert rollout.episodes == [[(3.0, 3)]]


def test_the_end_of_a_rollout_bootstraps():
    toy_environments.register()
    returns, mask, rollout = returns_of_one_rollout("toy/Counter-v0", 2)
    assert returns == pytest.approx([6.75, 1 + 0.5 * 21])
    assert mask == [True, True]
    assert rollout.episodes == [[]]


# ---- failures -----------------------------------------------------------------------------


@pytest.mark.parametrize("learner", ["fast", "plain"])
@pytest.mark.parametrize("env", TASKS)
def test_a_diverged_run_is_set_aside(env, learner):
    healthy = tiny(env=env, recipe="ppo", learner=learner)
    broken = dataclasses.replace(healthy, seed=1, learning_rate=1e30)
    trainer, rows = train([broken, healthy], 4)
    _, alone = train([healthy], 4)
    assert set(trainer.failed) == {0}
    assert "update 1 (step 64)" in trainer.failed[0]
    for number, (row,) in enumerate(alone):
        assert_same_rows(rows[number][1], row, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "word"), [("rgpo-dual-product", "reference_log_ratio"), ("gspo", "sequence")]
)
def test_recipes_that_control_cannot_run_are_refused(recipe, word):
    with pytest.raises(RgpoError, match=f"'{recipe}'.*{word}"):
        Trainer([tiny(recipe=recipe)])


def test_the_fast_learner_refuses_what_it_does_not_cover():
    with pytest.raises(RgpoError, match="fast learner"):
        Trainer([tiny(learner="fast", hidden=(16, 8))])


def test_runs_of_different_tasks_are_not_trained_together():
    with pytest.raises(RgpoError, match="share gamma"):
        Trainer([tiny(), tiny(gamma=0.9)])


# ---- spaces -------------------------------------------------------------------------------

VECTOR = gym.spaces.Box(-1, 1, (3,))
IMAGE = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
ACTIONS = {
    "discrete": gym.spaces.Discrete(3),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 3]),
    "multi-binary": gym.spaces.MultiBinary(3),
    "box": gym.spaces.Box(-2, 2, (2,)),
}
OBSERVATIONS = {
    "discrete": gym.spaces.Discrete(4),
    "image": IMAGE,
    "dict": gym.spaces.Dict({"camera": IMAGE, "joints": VECTOR, "mode": gym.spaces.Discrete(2)}),
}
CASES = {f"{name}-action": (VECTOR, space) for name, space in ACTIONS.items()}
CASES |= {f"{name}-observation": (space, ACTIONS["box"]) for name, space in OBSERVATIONS.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_space_is_trained(case):
    observation, action = CASES[case]
    arguments = {"observation": observation, "action": action}
    env = register("toy/Spaces-v0", entry_point=Spaces, kwargs=arguments)
    trainer, rows = train([tiny(env=env, rollout_steps=8, minibatch_size=8)], 2)
    fast = case in {"discrete-action", "box-action", "discrete-observation"}
    assert isinstance(trainer.learner, FastLearner if fast else PlainLearner)
    for (row,) in rows:
        assert np.isfinite(row["kl"])
        assert row["gradient_norm"] > 0
    assert rows[-1][0]["kl"] > 0
    assert rows[-1][0]["return"] == 5


@pytest.mark.parametrize("change", [{"squash": True}, {"state_dependent_std": True}])
def test_other_continuous_policies_are_trained(change):
    _, rows = train([tiny(env="Pendulum-v1", **change)], 2)
    assert all(np.isfinite(row["kl"]) and row["kl"] > 0 for (row,) in rows)


def test_atari_is_trained():
    pytest.importorskip("cv2")
    pytest.importorskip("ale_py")
    config = tiny(env="ALE/Pong-v5", num_envs=1, rollout_steps=8, minibatch_size=8, epochs=1)
    trainer, ((row,),) = train([config], 1)
    assert trainer.environments.observation_shapes == {"image": (4, 84, 84)}
    assert row["gradient_norm"] > 0


# ---- old data, anchors, objectives that adapt -----------------------------------------------


@pytest.mark.parametrize("learner", ["plain", "fast"])
@pytest.mark.parametrize("env", TASKS)
def test_stale_data_are_exactly_that_many_updates_old(env, learner):
    """The behaviour log-probs are those of the policy of 2 updates ago, the values present ones."""
    trainer = Trainer([tiny(env=env, staleness=2, learner=learner, learning_rate=1e-2)])
    history, seen = [trainer.learner.parameters_of_runs()], []
    update = trainer.learner.update
    trainer.learner.update = lambda batch, *rest: seen.append(batch) or update(batch, *rest)
    rows = []
    for _ in range(5):
        rows += trainer.step()
        history.append(trainer.learner.parameters_of_runs())
    for number, batch in enumerate(seen):
        for age, log_prob in ((2, batch.log_prob), (0, batch.proximal_log_prob)):
            trainer.learner.load_parameters(history[max(0, number - age)])
            parameters, value = trainer.learner.evaluate(batch.observation)
            expected = trainer.distribution.log_prob(parameters, batch.action)
            torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.value, value, rtol=1e-4, atol=1e-5)
    assert all(row["kl_behavior"] != row["kl"] for row in rows[2:])
    assert (seen[0].log_prob == seen[0].proximal_log_prob).all()
    assert (seen[2].log_prob != seen[2].proximal_log_prob).any()


def test_networks_of_different_sizes_learn_together_as_alone():
    """A head for the median makes one of them larger; old data need all parameters of the past."""
    configs = [tiny(recipe=name, staleness=1, learner="plain") for name in ("bpo", "ppo")]
    together, rows = train(configs, 3)
    sizes = [sum(x.numel() for x in p.parameters()) for p in together.learner.policies]
    assert sizes[0] > sizes[1]
    for i, config in enumerate(configs):
        alone, own = train([config], 3)
        ours = together.learner.parameters_of_runs()[i]
        assert torch.equal(ours[: sizes[i]], alone.learner.parameters_of_runs()[0])
        assert not ours[sizes[i] :].any()
        assert [row[i]["kl_behavior"] for row in rows] == [row["kl_behavior"] for (row,) in own]


def test_an_anchor_that_decays_is_the_average_of_the_past():
    """What proximal_log_prob refers to; a run without anchor_decay has the present policy."""
    name = next(r.name for r in recipes.recipes() if r.anchor_decay and r.level == "token")
    trainer = Trainer([tiny(recipe=name), tiny(recipe="ppo")])
    seen, update = [], trainer.learner.update
    trainer.learner.update = lambda batch, *rest: seen.append(batch) or update(batch, *rest)
    for _ in range(3):
        trainer.step()
    assert (seen[2].proximal_log_prob[0] != seen[2].log_prob[0]).any()
    torch.testing.assert_close(seen[2].proximal_log_prob[1], seen[2].log_prob[1])


def test_an_average_that_has_fallen_behind_starts_again_at_the_present_policy():
    """A clip of no width silences more than a tenth of the samples, one of 100 none."""
    narrow, wide = (("clip_low=1e-9", "clip_high=1e-9"), ("clip_low=1", "clip_high=100"))
    configs = [tiny(recipe="ppo-ewma-revised", set=bounds) for bounds in (narrow, wide)]
    trainer, _ = train(configs, 2)
    present, anchors = trainer.learner.parameters_of_runs(), trainer.anchors
    assert anchors.weight[0] == 1
    assert anchors.weight[1] > 1
    assert torch.equal(anchors.average[0], present[0])
    assert not torch.equal(anchors.average[1], present[1])


def test_objectives_and_their_learning_rate_follow_what_was_measured():
    @dataclasses.dataclass(frozen=True)
    class Adapting(SPO):
        def adapt(self, diagnostics):
            assert 0 < diagnostics["progress"] <= 1
            return dataclasses.replace(self, epsilon=self.epsilon + diagnostics["ess"])

        def learning_rate_scale(self, diagnostics):
            return 0.5 if diagnostics["ess"] else 1.0

    trainer = Trainer([tiny(recipe="spo"), tiny(recipe="ppo")])
    trainer.recipes[0] = dataclasses.replace(trainer.recipes[0], objective=Adapting())
    first, second = trainer.step(), trainer.step()
    expected = SPO().epsilon + first[0]["ess"] + second[0]["ess"]
    assert trainer.recipes[0].objective.epsilon == pytest.approx(expected)
    assert trainer.learner.objectives[0][0] == trainer.recipes[0].objective
    assert second[0]["learning_rate"] == pytest.approx(second[1]["learning_rate"] / 2)


@pytest.mark.parametrize(
    ("recipe", "env", "sentence"),
    [
        ("rgpo-dual-detached", "CartPole-v1", "no reference model"),
        ("gspo", "CartPole-v1", "whole sequences .the language trainer has them"),
        ("turn-ppo", "CartPole-v1", "segment_ids"),
        ("dpo", "CartPole-v1", "group_loss takes them"),
    ],
)
def test_what_control_cannot_supply_is_refused_by_name(recipe, env, sentence):
    with pytest.raises(RgpoError, match=sentence):
        Trainer([tiny(recipe=recipe, env=env)])
