"""TRPO's pieces against linear algebra, and its promise: the KL stays inside the ball."""

import dataclasses

import numpy as np
import torch
from test_learners import BASE, SAMPLES, flat, learners, make_batch

from rgpo.control.learner import Schedule
from rgpo.control.trpo import conjugate_gradient, natural_gradient_step


def test_conjugate_gradient_solves_a_positive_definite_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(6, dtype=torch.float64)
    target = torch.randn(6, generator=generator, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, target, steps=20)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-4, atol=1e-5)


def test_the_step_improves_the_surrogate_inside_the_ball():
    config = dataclasses.replace(BASE, recipe="trpo", max_kl=0.01)
    for space in ("box", "discrete"):
        plain, _, distribution = learners(space, [config])
        batch = make_batch(plain, distribution, 0).run(0)
        policy = plain.policies[0]
        assert natural_gradient_step(policy, distribution, batch, config)
        with torch.no_grad():
            new = policy.policy(batch.observation)
            kl = distribution.kl(batch.parameters, new)[batch.mask].mean()
            ratio = torch.exp(distribution.log_prob(new, batch.action) - batch.log_prob)
            advantage = batch.advantage - batch.advantage[batch.mask].mean()
            gain = ((ratio - 1) * advantage)[batch.mask].mean()
        assert 0.002 < kl <= 0.01
        assert gain > 0


def test_no_step_leaves_the_parameters_alone():
    config = dataclasses.replace(BASE, recipe="trpo")
    plain, _, distribution = learners("box", [config])
    batch = make_batch(plain, distribution, 0).run(0)
    batch.advantage = torch.full_like(batch.advantage, float("nan"))
    before = flat(plain, 0)
    assert not natural_gradient_step(plain.policies[0], distribution, batch, config)
    assert torch.equal(before, flat(plain, 0))


def test_an_update_trains_the_critic_as_well():
    config = dataclasses.replace(BASE, recipe="trpo")
    plain, _, distribution = learners("box", [config])
    batch = make_batch(plain, distribution, 0)
    order = np.tile(np.arange(SAMPLES), (1, BASE.epochs, 1))
    error = ((batch.value - batch.returns)[batch.mask] ** 2).mean()
    for _ in range(15):
        plain.update(batch, order, Schedule(np.array([3e-3]), np.zeros(1), np.zeros(1)))
    _, value = plain.evaluate(batch.observation)
    assert ((value - batch.returns)[batch.mask] ** 2).mean() < 0.8 * error
