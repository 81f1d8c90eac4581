"""The training loop against its definition: epoch 1 is back-propagation through time."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.glossary import GLOSSARY, markdown
from rgpo.differentiable.train import ReparamTrainer
from rgpo.differentiable.window import action_gradients, graph_bytes
from rgpo.errors import RgpoError

TINY = ReparamConfig(
    env="toy_tasks:Mortal",
    num_envs=6,
    window=12,
    steps=6 * 12 * 4,
    hidden=(16, 16),
    dtype="float64",
    track=(),
)


def tiny(**changes) -> ReparamConfig:
    return dataclasses.replace(TINY, **changes)


def warmed(*configs) -> ReparamTrainer:
    """After two updates: statistics, targets and policy are no longer those of the start."""
    trainer = ReparamTrainer(configs)
    trainer.step()
    trainer.step()
    return trainer


def numbers(row):
    return {k: v for k, v in row.items() if not k.startswith("seconds")}


def return_of(trainer, rows, noise, kinds):
    """R of every environment, unrolled anew and written out: (E,), with the graph of `rows`."""
    config, env, learner = trainer.config, trainer.environments, trainer.learner
    observation, rewards = env.detach(), [[] for _ in range(config.num_envs)]
    total = torch.zeros(config.num_envs, dtype=torch.float64)
    for t in range(config.window):
        mean, log_std = learner.actor(trainer.normalizer(observation[None]), rows)
        action = torch.tanh(mean + torch.exp(log_std) * noise[t])[0]
        observation, reward, terminated, truncated, info = env.step(action)
        final = learner.targets(trainer.normalizer(info["final_obs"][None]))[0].mean(0)
        for e in range(config.num_envs):
            rewards[e].append(reward[e])
            if truncated[e] or (t == config.window - 1 and not terminated[e]):
                rewards[e].append(final[e])
            if terminated[e] or truncated[e] or t == config.window - 1:
                part = sum(config.gamma**k * r for k, r in enumerate(rewards[e]))
                total = total + torch.nn.functional.one_hot(torch.tensor(e), len(total)) * part
                rewards[e] = []
        kinds += ["terminated"] * int(terminated.sum()) + ["truncated"] * int(truncated.sum())
    return total


@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_the_first_epoch_is_full_back_propagation_through_time(state_dependent_std):
    """To 1e-12 relative, with terminations, truncations and resets inside the window."""
    trainer = warmed(tiny(state_dependent_std=state_dependent_std))
    env, learner = trainer.environments, trainer.learner
    generators = (learner.generators[0], env.generators[0])
    saved = [generator.get_state() for generator in generators]
    start = (env.state.clone(), env.elapsed.clone())
    schedule = trainer._schedule()
    window = trainer._unroll(schedule)
    everyone = torch.ones(1, trainer.config.num_envs, dtype=torch.bool)
    batch = trainer._batch(window, action_gradients(window), everyone)
    rows = learner.actor.rows.clone().requires_grad_()
    loss, kl = learner.actor_losses(batch, schedule, rows)
    (found,) = torch.autograd.grad(loss, rows)
    assert float(kl) == pytest.approx(0, abs=1e-14)

    for generator, state in zip(generators, saved, strict=True):
        generator.set_state(state)
    env.state, env.elapsed = start
    size = (trainer.config.window, trainer.config.num_envs, 1)
    noise = torch.randn(size, generator=generators[0], dtype=torch.float64)
    kinds: list[str] = []
    total = return_of(trainer, rows, noise, kinds)
    assert set(kinds) == {"terminated", "truncated"}
    (expected,) = torch.autograd.grad(-total.sum() / noise.numel(), rows)
    for name, true in learner.actor.split(expected).items():
        mine = learner.actor.split(found)[name]
        assert float((mine - true).norm() / true.norm()) < 1e-12, name


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("importance", ()),
        ("reparam-mask", ("clip_low=0.2", "clip_high=0.2")),
        ("rgpo-gate", ()),
        ("gipo", ("kl_coefficient=0.3",)),
    ],
)
def test_mask_gate_and_kl_leave_the_first_epoch_as_it_is_and_change_the_later_ones(recipe, changes):
    policies = []
    for settings in ((recipe, changes), ("reparam-mask", ())):
        for epochs in (1, 4):
            config = tiny(recipe=settings[0], set=settings[1], epochs=epochs, learning_rate=0.02)
            trainer = ReparamTrainer([config])
            trainer.step()
            policies.append(trainer.learner.actor.rows.clone())
    torch.testing.assert_close(policies[0], policies[2], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(policies[1], policies[3], rtol=1e-6)


@pytest.mark.parametrize("algo", ["reparam-ppo", "reppo"])
def test_soft_rewards_and_entropy_change_what_is_learnt(algo):
    plain, soft = (
        ReparamTrainer([tiny(algo=algo, **changes)])
        for changes in ({}, {"entropy_coefficient": 0.5, "soft_rewards": True})
    )
    rows = [trainer.step()[0] for trainer in (plain, soft)]
    assert rows[0]["kl"] != rows[1]["kl"]
    assert rows[1]["entropy_coefficient"] == pytest.approx(0.5)


def test_soft_rewards_of_a_learned_q_leave_terminal_steps_alone():
    """The trap of REPPO's code: no entropy follows a terminated step."""
    config = tiny(algo="reppo", entropy_coefficient=3.0, soft_rewards=True, lam=0.0)
    trainer = warmed(config)
    schedule = trainer._schedule()
    window = trainer._unroll(schedule)
    (generator,) = trainer.learner.generators
    state = generator.get_state()
    _, soft, _ = trainer._critic_targets(window, schedule)
    generator.set_state(state)
    trainer.config = dataclasses.replace(config, soft_rewards=False)
    _, hard, _ = trainer._critic_targets(window, schedule)
    assert bool(window.terminated.any())
    assert torch.equal(soft[window.terminated], hard[window.terminated])
    assert (soft != hard)[~window.terminated].all()
    torch.testing.assert_close(hard[window.terminated], window.reward[window.terminated])


def test_the_entropy_weight_is_tuned_towards_its_target():
    found = []
    for target in (-5.0, 5.0):
        trainer = ReparamTrainer([tiny(entropy_coefficient=1.0, entropy_target=target)])
        found.append([trainer.step()[0]["entropy_coefficient"] for _ in range(3)][-1])
    assert found[0] < 1 < found[1]


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not():
    def run(seed):
        trainer = ReparamTrainer([tiny(seed=seed, minibatches=3)])
        return [numbers(trainer.step()[0]) for _ in range(3)]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("algo", ["reparam-ppo", "reppo"])
def test_every_metric_is_defined_and_no_other(algo):
    (row,) = ReparamTrainer([tiny(algo=algo)]).step()
    assert set(row) == set(GLOSSARY)
    assert row["variance_pathwise"] < row["variance_score"]


def test_returns_of_episodes_are_their_rewards():
    """Staggered first episodes are not counted; after those, each ended episode once."""
    trainer = ReparamTrainer([tiny(env="rgpo/Pendulum", num_envs=2, window=50, steps=900)])
    rows = [trainer.step()[0] for _ in range(9)]
    counted = [row for row in rows if row["episodes"]]
    assert sum(row["episodes"] for row in rows) in (2, 3, 4)
    assert all(row["episode_length"] == 200 for row in counted)
    assert all(-2000 < row["return"] < 0 for row in counted)


def test_lqr_comes_within_one_percent_of_the_closed_form():
    config = ReparamConfig(env="rgpo/LQR", steps=60_000, set=("kl_coefficient=0.02",), track=())
    trainer = ReparamTrainer([config])
    for _ in range(config.updates):
        trainer.step()
    task = trainer.task
    start = task.reset(512, torch.Generator().manual_seed(7))
    state, cost = start, torch.zeros(512)
    for t in range(1000):
        mean, _ = trainer.learner.actor(trainer.normalizer(task.observe(state)[None]))
        state, reward, _ = task.step(state, mean[0])
        cost = cost - config.gamma**t * reward
    optimal, _ = task.optimum(config.gamma)
    best = torch.einsum("ei,ij,ej->e", start.double(), optimal, start.double())
    assert 1 <= float(cost.double().mean() / best.mean()) < 1.01


# ---- bad input ----------------------------------------------------------------------------


def test_environments_that_go_wrong_are_left_out_counted_and_told():
    config = tiny(env="toy_tasks:Exploding", num_envs=16)
    trainer = ReparamTrainer([config])
    with pytest.warns(UserWarning, match=r"not finite in environment \d+, step \d+ of the window"):
        rows = [trainer.step()[0] for _ in range(2)]
    assert rows[0]["nonfinite_environments"] > 0
    assert torch.isfinite(trainer.learner.actor.rows).all()
    assert rows[1]["nonfinite"] == 0


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ("Rounded", "no gradient reaches the action"),
        ("InPlace", "changes a tensor in place"),
    ],
)
def test_a_task_that_cannot_be_differentiated_is_refused(env, sentence):
    with pytest.raises(RgpoError, match=sentence):
        ReparamTrainer([tiny(env=f"toy_tasks:{env}")]).step()


def test_a_learned_q_needs_no_differentiable_task():
    (row,) = ReparamTrainer([tiny(env="toy_tasks:Rounded", algo="reppo")]).step()
    assert row["action_gradient_norm"] > 0


def test_a_window_that_does_not_fit_in_memory_is_refused_before_it_starts():
    with pytest.raises(RgpoError, match="GiB for its graph"):
        ReparamTrainer([tiny(env="rgpo/Hopper", num_envs=64, window=10**9)])


def test_the_estimate_of_the_graph_is_that_of_a_window_where_episodes_end_all_the_time():
    trainer = ReparamTrainer([tiny(env="rgpo/Cartpole", num_envs=2048)])
    functions = (trainer.learner.actor, trainer.normalizer, trainer._bootstrap)
    estimate = trainer.config.window * graph_bytes(trainer.environments, *functions, 1)
    sizes: dict[int, int] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        window = trainer._unroll(trainer._schedule())
    assert bool(window.truncated.any(-1).all())
    assert estimate == pytest.approx(sum(sizes.values()), rel=0.25)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipe": "rgpo-dual-detached"}, "not a fixed weight"),
        ({"recipe": "trpo"}, "not a fixed weight"),
        ({"recipe": "gspo"}, "not a fixed weight"),
        ({"recipe": "nothing"}, "unknown recipe"),
        ({"minibatches": 5}, "does not divide the 72 samples"),
        ({"soft_rewards": True}, "entropy_coefficient above 0"),
        ({"entropy_target": -0.5}, "must start above 0"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\]"),
        ({"window": 0}, "window must be at least 1"),
        ({"device": "cuda:99"}, "cannot be used here"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(RgpoError, match=sentence):
        ReparamTrainer([tiny(**changes)])


def test_one_epoch_says_that_weight_and_kl_do_nothing():
    assert "is SHAC" in tiny(epochs=1).warnings()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tiny().warnings()


def test_a_run_whose_environments_all_go_wrong_has_failed():
    trainer = ReparamTrainer([tiny(env="toy_tasks:AllExploding")])
    trainer.step()
    assert "every environment's gradient or state was not finite" in trainer.failed[0]


def test_the_page_holds_the_glossary():
    page = Path(__file__).parents[2] / "docs" / "differentiable.md"
    assert markdown() in page.read_text()
