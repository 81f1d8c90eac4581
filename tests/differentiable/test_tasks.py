"""Tasks: exact gradients, known physics, and one task behind three interfaces."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from rgpo.control import snapshot
from rgpo.control.environments import make_environments
from rgpo.differentiable import gymnasium_view
from rgpo.differentiable.tasks import TASKS, make_task
from rgpo.differentiable.vector import TaskVectorEnv
from rgpo.errors import RgpoError


def some(task, number=5, steps=8):
    generator = torch.Generator().manual_seed(3)
    state = task.reset(number, generator, torch.float64)
    size = (steps, number, task.action_size)
    return state, 1.6 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.8


@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_those_of_finite_differences(name):
    """Of rewards and observations of a rollout, by actions and initial state."""
    task = make_task(name)
    state, actions = some(task, steps=8 if name != "rgpo/Hopper" else 4)

    def score(state, actions):
        total = 0
        for action in actions:
            state, reward, _ = task.step(state, action)
            total = total + reward.sum() + (0.3 * task.observe(state)).sum()
        return total

    inputs = [state.requires_grad_(), actions.requires_grad_()]
    gradients = torch.autograd.grad(score(*inputs), inputs)
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step = 1e-6
    with torch.no_grad():
        ends = [
            score(*(x + sign * step * d for x, d in zip(inputs, direction, strict=True)))
            for sign in (1, -1)
        ]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=2e-6)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_determinism(name, dtype):
    task = make_task(name)
    first, second = (TaskVectorEnv(task, 3, seed=1, dtype=dtype) for _ in range(2))
    assert torch.equal(first.state, second.state)
    action = torch.zeros(3, task.action_size, dtype=dtype)
    observation, reward, terminated, truncated, info = first.step(action)
    assert observation.shape == info["final_obs"].shape == (3, task.observation_size)
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    assert observation.dtype == reward.dtype == dtype
    assert terminated.dtype == truncated.dtype == torch.bool
    assert torch.equal(observation, second.step(action)[0])
    assert first.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_pendulum_is_gymnasiums():
    reference = gym.make("Pendulum-v1").unwrapped
    reference.reset(seed=0)
    task = make_task("rgpo/Pendulum")
    state = torch.tensor(reference.state)[None]
    for u in np.random.default_rng(0).uniform(-1, 1, 150):
        state, reward, _ = task.step(state, torch.tensor([[u]]))
        _, expected, *_ = reference.step(np.array([2 * u]))
        assert float(reward) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(state[0].numpy(), reference.state, atol=1e-12)


def test_a_hopper_at_rest_is_held_by_the_ground_and_never_pulled():
    task = make_task("rgpo/Hopper")
    state = task.initial(torch.full((1, 4), 0.5, dtype=torch.float64))
    for _ in range(150):
        state, _, terminated = task.step(state, torch.zeros(1, 2, dtype=torch.float64))
    assert not terminated
    weight = 1.2 * 9.8  # body and foot
    assert float(state[0, 3]) == pytest.approx(-weight / 2000, rel=0.05)
    height, sliding, rising = torch.tensor([[-0.001, 0.0, 0.5], [0.1, 1.0, -3.0]]).double().T
    assert (task._ground(height, sliding, rising)[:, 1] >= 0).all()
    assert (task._ground(height, sliding, rising)[1] == 0).all()


def test_the_optimum_of_lqr_is_the_cost_of_its_own_gain_and_better_than_neighbours():
    task = make_task("rgpo/LQR")
    optimal, gain = task.optimum(0.99)
    start, _ = some(task)

    def cost(gain):
        state, total = start, 0
        for t in range(3000):
            state, reward, _ = task.step(state, -state @ gain.T)
            total = total - 0.99**t * reward
        return total

    expected = torch.einsum("ei,ij,ej->e", start, optimal, start)
    torch.testing.assert_close(cost(gain), expected, rtol=1e-8, atol=0)
    for scale in (0.95, 1.05):
        assert (cost(scale * gain) > expected).all()


def test_a_truncated_episode_tells_its_final_observation_and_resets_alone():
    env = TaskVectorEnv(make_task("rgpo/Pendulum"), 3)
    env.elapsed[1] = env.task.max_steps - 1
    action = torch.full((3, 1), 0.5, requires_grad=True)
    observation, _, terminated, truncated, info = env.step(action)
    assert truncated.tolist() == info["_final_obs"].tolist() == [False, True, False]
    assert not terminated.any()
    assert env.elapsed.tolist() == [1, 0, 1]
    same = (observation == info["final_obs"]).all(1)
    assert same.tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(observation.sum(), action, retain_graph=True)
    assert (gradient[:, 0] != 0).tolist() == [True, False, True]  # the reset cuts its own only
    (gradient,) = torch.autograd.grad(info["final_obs"].sum(), action)
    assert (gradient != 0).all()
    assert not env.detach().requires_grad


@pytest.mark.parametrize("name", TASKS)
def test_the_gymnasium_view_is_the_same_task(name):
    """Also for control's environments, which can save and restore it exactly."""
    batch = make_environments(name, [5, 6], backend="gymnasium")
    assert batch.exact_state, batch.state_note
    seen = batch.reset()["vector"]
    task, envs = make_task(name), batch.envs
    state = torch.tensor(np.stack([env.unwrapped.state for env in envs]))
    np.testing.assert_allclose(seen, task.observe(state), rtol=1e-5, atol=1e-6)
    action = np.full((2, task.action_size), 0.3, np.float32)
    saved = snapshot.capture(envs[0])
    step = batch.step(action)
    state, reward, _ = task.step(state, torch.tensor(action).double())
    np.testing.assert_allclose(step.reward, reward, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step.observation["vector"], task.observe(state), atol=1e-5)
    snapshot.restore(envs[0], saved)
    again = envs[0].step(action[0])
    np.testing.assert_array_equal(again[0], step.observation["vector"][0])


def test_the_gymnasium_view_clips_truncates_and_draws():
    env = gym.make("rgpo/Pendulum", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8
    assert frame.shape[0] == gymnasium_view.HEIGHT
    assert 0 < (frame[..., 0] != 255).mean() < 0.05
    twin = gym.make("rgpo/Pendulum")
    twin.reset(seed=0)
    assert env.step(np.array([9.0]))[1] == twin.step(np.array([1.0]))[1]
    ends = [env.step(np.array([0.0]))[3] for _ in range(199)]
    assert ends == [False] * 198 + [True]


def test_a_name_that_is_no_task_is_told():
    with pytest.raises(RgpoError, match="did you mean rgpo/Cartpole"):
        make_task("rgpo/CartPole")
    with pytest.raises(RgpoError, match="No module named 'nowhere'"):
        make_task("nowhere:Task")
    with pytest.raises(RgpoError, match="make it a subclass"):
        make_task("math:pi")
    assert make_task("toy_tasks:Mortal").max_steps == 5
