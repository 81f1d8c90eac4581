"""Plans of comparisons: which runs there are, in which order, and who trains them."""

import dataclasses
import itertools

import pytest

from rgpo.control.config import TrainConfig
from rgpo.errors import RgpoError
from rgpo.studies.compare import Plan, plan

BASE = TrainConfig(env="CartPole-v1", seed=3)
ARMS = ("trpo", "rgpo", "ppo:clip_low=0.1,clip_high=0.3")


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 100])
def test_every_arm_has_every_seed_once_in_the_order_of_the_arms(tmp_path, workers):
    planned = plan(BASE, ARMS, 3, tmp_path, workers=workers)
    labels = ["rgpo"] * 3 + ["ppo clip_low=0.1 clip_high=0.3"] * 3 + ["trpo"] * 3
    assert [c.label for c in planned.configs] == labels
    assert [c.seed for c in planned.configs] == [3, 4, 5] * 3
    assert len({planned.path(c) for c in planned.configs}) == 9
    for group in planned.groups:  # equal steps together, equal objectives next to each other
        assert len({c.resolve().step for c in group}) == 1
        changes = sum(a.label != b.label for a, b in itertools.pairwise(group))
        assert changes == len({c.label for c in group}) - 1


def test_a_saved_plan_is_loaded(tmp_path):
    planned = plan(dataclasses.replace(BASE, hidden=(8,)), ARMS, 2, tmp_path, command="rgpo x")
    planned.save()
    assert Plan.load(tmp_path) == planned


def test_a_damaged_plan_is_refused(tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(RgpoError, match="no readable comparison"):
        Plan.load(tmp_path)
