"""The estimate of memory, and how much of it there is."""

import dataclasses

import pytest
import torch

from rgpo.control import memory
from rgpo.control.config import TrainConfig
from rgpo.control.train import Trainer

BASE = TrainConfig(env="CartPole-v1", backend="gymnasium", num_envs=2, rollout_steps=64)


def footprint(**changes):
    trainer = Trainer([dataclasses.replace(BASE, **changes)])
    found = memory.footprint(trainer)
    trainer.environments.close()
    return trainer, found


def test_layers_are_counted_without_being_computed():
    trainer, _ = footprint(hidden=(16, 8))
    count = memory.activation_floats(trainer.learner.policies[0], {"vector": (4,)})
    assert count == 2 * 2 * (16 + 8) + 2 + 1  # linear and tanh of actor and critic, two heads


def test_wider_networks_and_longer_rollouts_take_what_they_hold():
    trainer, small = footprint()
    wide_trainer, wide = footprint(hidden=(512, 512))
    _, long = footprint(rollout_steps=4096)
    parameters = [t.learner.parameters_of_runs().shape[1] for t in (trainer, wide_trainer)]
    assert wide.per_run - small.per_run > 4 * 4 * (parameters[1] - parameters[0])
    assert long.per_run > 10 * small.per_run  # 64 times the samples, the same environments
    assert small.per_process > torch.zeros(1).element_size() * 2**20


def test_a_run_takes_the_same_whoever_is_beside_it(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 300 * 2**20)  # what it is is chance
    trainer = Trainer([dataclasses.replace(BASE, env="Hopper-v5", seed=seed) for seed in range(8)])
    alone = Trainer([dataclasses.replace(BASE, env="Hopper-v5")])
    found = [memory.footprint(t).per_run for t in (trainer, alone)]
    assert found[0] == found[1]
    assert found[0] > 2 * memory.MUJOCO


def test_as_many_runs_as_fit():
    need = memory.Footprint(per_run=10, per_process=100)
    assert [need.runs(budget) for budget in (0, 105, 110, 129, 130)] == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path, version):
    own = tmp_path / "own"
    own.write_text("3:cpuset:/\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    top = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = names if version == 1 else ("memory.max", "memory.current")
    for folder, most in (("a", "1000"), ("a/b", "max" if version == 2 else str(2**63 - 4096))):
        (top / folder).mkdir(parents=True)
        (top / folder / limit).write_text(f"{most}\n")
        (top / folder / used).write_text("700\n")
        (top / folder / "memory.stat").write_text("cache 9\ninactive_file 200\n")
    assert list(memory._cgroup_free(tmp_path, own)) == [500]


def test_this_machine_has_memory():
    assert memory.resident_bytes() > 2**20
    assert memory.available_bytes(torch.device("cpu")) > 2**20


def test_on_a_gpu_its_own_memory_counts_too(monkeypatch):
    """Its free bytes are made up: no GPU is at hand, and the question is which limit counts."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12345, 67890))
    assert memory.available_bytes(torch.device("cuda:1")) == 12345
    trainer = Trainer([BASE])
    assert memory.room(trainer) > 2**20
    trainer.device = torch.device("cuda:1")
    assert memory.room(trainer) == 12345
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**60, 2**60))
    assert memory.room(trainer) < 2**60
