"""Ant of the paper: as rewarped computes it, and against finite differences."""

import sys

import pytest
import torch

from rgpo.differentiable import rewarped
from rgpo.differentiable.tasks import make_task
from rgpo.errors import RgpoError

NAME = "rgpo.differentiable.rewarped:Ant"


@pytest.fixture
def task():
    pytest.importorskip("rewarped")
    return make_task(NAME)


def drawn(task, steps, number=8):
    generator = torch.Generator().manual_seed(0)
    size = (steps, number, task.action_size)
    return task.reset(number, generator), torch.rand(size, generator=generator) - 0.5


def rolled(task, state, actions):
    total = 0
    for action in actions:
        state, reward, _ = task.step(state, action)
        total = total + reward
    return total


def test_values_and_gradients_are_those_of_the_package(task):
    state, actions = drawn(task, 6)
    actions.requires_grad_()
    ours = rolled(task, state, actions)
    (gradient,) = torch.autograd.grad(ours.sum(), actions)
    assert torch.equal(rolled(task, state, actions), ours)
    env = rewarped._loaded(state)
    env.state_0, env.control_0 = env.model.state(), env.model.control()
    for name, tensor in zip(env.state_tensors_names, env.state_tensors, strict=True):
        env.state.assign(name, tensor)
    rewarped._forward_kinematics(env)
    theirs = sum(env.step(action)[1] for action in actions)
    assert not env.reset_buf.any()
    assert torch.equal(theirs, ours)
    assert torch.equal(torch.autograd.grad(theirs.sum(), actions)[0], gradient)


def test_the_gradient_of_one_step_by_its_action_is_that_of_finite_differences(task):
    state, actions = drawn(task, 1)
    actions.requires_grad_()
    (gradient,) = torch.autograd.grad(rolled(task, state, actions).sum(), actions)
    measured = torch.zeros_like(gradient)
    with torch.no_grad():
        for index in range(task.action_size):
            change = torch.zeros_like(actions)
            change[..., index] = 0.01
            ends = [rolled(task, state, actions + sign * change) for sign in (1, -1)]
            measured[0, :, index] = (ends[0] - ends[1]) / 0.02
    assert (gradient - measured).norm() < 0.02 * measured.norm()


def test_initial_states_are_drawn_as_in_the_package(task):
    generator = torch.Generator().manual_seed(0)
    ours = task.reset(2000, generator)[:, :29]
    env = rewarped._environments(2000, "cpu")
    env.reset()
    theirs = torch.cat([part.view(2000, -1) for part in env.state_tensors], dim=-1)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.01, rtol=0)


def test_without_rewarped_a_sentence_says_where_to_look(monkeypatch):
    rewarped._suite.cache_clear()
    monkeypatch.setitem(sys.modules, "rewarped.envs", None)
    with pytest.raises(RgpoError, match=r"see docs/differentiable\.md"):
        make_task(NAME)
