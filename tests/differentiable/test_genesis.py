"""Genesis: our own cart-pole in it, contacts against finite differences, training and resume."""

import dataclasses
import signal
import sys

import pytest
import torch

from rgpo.differentiable import genesis, session
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.tasks import make_task
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run

NAME = "rgpo.differentiable.genesis:GenesisCartpole"


class Leg(genesis.GenesisTask):
    """A mass on a sliding leg that falls on a rough floor; the leg's slide has limits."""

    state_size, observation_size, action_size, noise_size = 8, 8, 2, 1
    max_steps, dt, substeps, constrained = 100, 0.01, 2, True
    model = """
    <mujoco>
      <worldbody>
        <geom type="plane" size="50 50 1" friction="1 0 0"/>
        <body pos="0 0 1">
          <joint name="x" type="slide" axis="1 0 0"/>
          <joint name="z" type="slide" axis="0 0 1"/>
          <joint name="pitch" type="hinge" axis="0 1 0"/>
          <geom type="sphere" size="0.1" mass="3"/>
          <body>
            <joint name="leg" type="slide" axis="0 0 -1" damping="1" limited="true"
                   range="-0.3 0.3"/>
            <geom type="sphere" pos="0 0 -0.8" size="0.05" mass="0.5" friction="1 0 0"/>
          </body>
        </body>
      </worldbody>
    </mujoco>
    """
    actuated = {"pitch": 10.0, "leg": 60.0}  # noqa: RUF012

    def initial(self, noise):
        raise NotImplementedError

    def observe(self, state):
        return state

    def drawing(self, state):
        raise NotImplementedError

    def step(self, state, action):
        state = self.move(state, action)
        return state, state[:, 4] + 0.3 * state[:, 2], state[:, 1] < -0.5


@pytest.fixture
def task():
    pytest.importorskip("genesis")
    return make_task(NAME)


def drawn(task, number=6, steps=16):
    generator = torch.Generator().manual_seed(0)
    state = task.reset(number, generator, torch.float64)
    state = state + torch.randn(state.shape, generator=generator, dtype=torch.float64)
    size = (steps, number, task.action_size)
    return state, 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1


def rolled(task, state, actions):
    """A sum over the rollout for every environment, and the last states."""
    total = 0
    for action in actions:
        state, reward, _ = task.step(state, action)
        total = total + reward + 0.3 * task.observe(state).sum(-1)
    return total, state


def test_values_and_gradients_are_those_of_our_own_cartpole(task):
    """Two simulators, one set of equations: through 16 steps, by actions and initial states."""
    found = []
    for one in (task, make_task("rgpo/Cartpole")):
        inputs = [tensor.clone().requires_grad_() for tensor in drawn(one)]
        total, last = rolled(one, *inputs)
        found.append((total, last, *torch.autograd.grad(total.sum(), inputs)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_gradients_through_contact_friction_and_limits_are_those_of_finite_differences():
    pytest.importorskip("genesis")
    task, generator = Leg(), torch.Generator().manual_seed(1)

    def uniform(*size):
        return 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1

    state = torch.zeros(16, 8, dtype=torch.float64)
    state[:, 1] = -0.13 + 0.02 * uniform(16)  # the foot 0 to 4 cm above the floor
    state[:, 2], state[:, 4:7] = 0.1 * uniform(16), 0.5 * uniform(16, 3)
    state[:, 5] -= 0.7
    inputs = [state.requires_grad_(), uniform(12, 16, 2).requires_grad_()]
    total, last = rolled(task, *inputs)
    gradients = torch.autograd.grad(total.sum(), inputs)
    speed = last[:, 7].detach()
    foot = 0.95 + last[:, 1] - 0.8 * torch.cos(last[:, 2]) - last[:, 3] * torch.cos(last[:, 2])
    assert (foot < 0.05).sum() > 3
    assert (speed != 0).all()
    direction = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]
    parts = [g * d for g, d in zip(gradients, direction, strict=True)]
    slope = parts[0].sum(-1) + parts[1].sum((0, 2))
    step = 1e-6
    with torch.no_grad():
        ends = [
            rolled(task, *(x + sign * step * d for x, d in zip(inputs, direction, strict=True)))[0]
            for sign in (1, -1)
        ]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_step_is_a_function_of_its_arguments_alone(task):
    state, actions = drawn(task)
    first = task.step(state, actions[0])[0]
    task.step(first, actions[1])
    assert torch.equal(task.step(state, actions[0])[0], first)
    single = task.step(state.float(), actions[0].float())[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, first.float())


def test_an_environment_that_is_not_finite_is_alone_in_it(task):
    state, actions = drawn(task)
    state[3, 1] = torch.nan
    actions[0, 1, 0] = torch.inf
    inputs = [state.requires_grad_(), actions[0].clone().requires_grad_()]
    after = task.step(*inputs)[0]
    expected = [False, True, False, True, False, False]
    for tensor in (after, *torch.autograd.grad(after.sum(), inputs)):
        assert torch.isnan(tensor).any(1).tolist() == expected
        assert torch.isfinite(tensor).all(1).tolist() == [not bad for bad in expected]
    inputs[1] = torch.full_like(inputs[1], 1e300).requires_grad_()
    after = task.step(torch.zeros_like(state), inputs[1])[0]
    with pytest.raises(RgpoError, match="Genesis could not differentiate a step: Nan grad"):
        torch.autograd.grad(after.sum(), inputs[1])


def test_training_learns_and_resumes_bit_for_bit(task, tmp_path):
    del task
    config = ReparamConfig(env=NAME, steps=10_240, eval_episodes=2, checkpoint_every=5, track=())
    assert session.start([config], [tmp_path / "whole"]) == ["finished"]
    run = Run.open(tmp_path / "whole")
    # -190 at the start, as in the native task
    assert min(run.status["result"]["eval_returns"]) > -120

    def stop(done, *_):
        if done == 13:
            signal.raise_signal(signal.SIGINT)

    part = tmp_path / "part"
    assert session.start([dataclasses.replace(config, eval_episodes=0)], [part], stop) == [
        "interrupted"
    ]
    assert session.resume([part]) == ["finished"]
    first, second = (checkpoint.newest(Run.open(p).checkpoints)[0] for p in (run.path, part))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_without_genesis_a_sentence_says_what_to_install(monkeypatch):
    genesis._genesis.cache_clear()
    monkeypatch.setitem(sys.modules, "genesis", None)
    with pytest.raises(RgpoError, match=r"pip install 'rgpo\[genesis\]'"):
        make_task(NAME)
