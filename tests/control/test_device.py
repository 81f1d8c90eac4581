"""No GPU is needed to see that the code is clean of hard-coded devices and of waiting for one.

Tensors of the "meta" device have no numbers: an operation that mixes them with tensors of the CPU
raises, and so does every question about a value (`bool`, `float`, `item`, `numpy`). `Tensor.cpu`
alone is replaced, and counted.
"""

import dataclasses

import pytest
import torch

from rgpo.control import session
from rgpo.control.config import TrainConfig
from rgpo.control.fast import FastLearner
from rgpo.control.learner import PlainLearner
from rgpo.control.train import Trainer
from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint

TIME, UPDATES = 8, 2
TINY = TrainConfig(
    num_envs=2,
    rollout_steps=TIME,
    minibatch_size=8,
    epochs=2,
    hidden=(8, 8),
    steps=2 * TIME * UPDATES,
    backend="gymnasium",
    device="meta",
    eval_episodes=0,
    track=(),
)
RECIPES = [  # all that the fast learner can train on any task, side by side
    r.name
    for r in recipes.recipes()
    if (r.level, r.step, r.data) == ("token", "gradient", "policy")
    and r.objective.scope in ("element", "batch")
    and not {"reference_log_ratio", "median_advantage", "log_prob"} & set(r.objective.needs)
]


@pytest.fixture
def transfers(monkeypatch):
    """Every transfer to the host, by shape; what arrives there is zeros."""
    found = []

    def cpu(tensor):
        if tensor.device.type == "cpu":
            return tensor
        found.append(tuple(tensor.shape))
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return found


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("change", [{}, {"squash": True}, {"value_clip": 0.2}, {"staleness": 1}])
def test_the_host_waits_after_an_update_not_inside(env, change, transfers):
    if change.get("squash") and env != "Pendulum-v1":
        pytest.skip("only continuous actions are squashed")
    arms = [dataclasses.replace(TINY, env=env, recipe=name, **change) for name in RECIPES]
    trainer = Trainer([*arms, dataclasses.replace(arms[0], target_kl=0.01)])
    assert isinstance(trainer.learner, FastLearner)
    for _ in range(UPDATES):
        transfers.clear()
        trainer.step()
        # the actions of every step, the norms, the metrics, and what certificates are made of
        assert len(transfers) == TIME + 2 + 4
    trainer.environments.close()


@pytest.mark.parametrize("change", [{}, {"hidden": (8, 4)}, {"recipe": "s-ppo-variant"}])
def test_the_plain_learner_waits_at_the_end_as_well(change, transfers, monkeypatch):
    """Its gradient norms apart, which are read run by run through `float`."""
    monkeypatch.setattr(
        "rgpo.control.learner._summary",
        lambda norms: {
            key: torch.zeros(len(norms)).double().numpy()
            for key in ("gradient_norm", "optimizer_steps")
        },
    )
    config = dataclasses.replace(TINY, env="Pendulum-v1", learner="plain", **change)
    trainer = Trainer([config])
    assert isinstance(trainer.learner, PlainLearner)
    trainer.step()
    trainer.environments.close()
    assert len(transfers) == TIME + 1 + 4


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
@pytest.mark.usefixtures("transfers")
def test_checkpoints_come_from_the_device_and_return_to_it(tmp_path):
    paths = [tmp_path / str(i) for i in range(2)]
    base = dataclasses.replace(TINY, env="Pendulum-v1", recipe="ppo-ewma", staleness=1)
    configs = [dataclasses.replace(base, seed=seed) for seed in (0, 1)]
    assert session.start(configs, paths) == ["finished"] * 2
    saved = [checkpoint.newest(path / "checkpoints")[0] for path in paths]
    assert {t.device.type for t in saved[0].tensors.values()} == {"cpu"}
    trainer = Trainer(configs)
    trainer.restore(saved)
    assert trainer.learner.parameters_of_runs().device.type == "meta"
    trainer.step()


def test_a_device_that_is_not_there_is_refused_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RgpoError, match=r"^device 'cuda' cannot be used here \(.*\): use cpu$"):
        Trainer([dataclasses.replace(TINY, device="cuda", env="CartPole-v1")])
    with pytest.raises(RgpoError, match="'gpu' cannot be used here"):
        Trainer([dataclasses.replace(TINY, device="gpu", env="CartPole-v1")])
