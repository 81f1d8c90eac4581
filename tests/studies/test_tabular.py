"""Exact solutions of decision problems, against iteration, simulation and the lemma."""

import math

import pytest
import torch

from rgpo.studies.tabular import Problems, random_problems, solve

SHAPES = [(2, 2, 0.5), (7, 5, 0.97), (4, 3, 0.9), (1, 2, 0.0)]


def drawn(states, actions, gamma, count=20):
    """Problems with two policies each."""
    source = torch.Generator().manual_seed(states * actions)
    problems = random_problems(count, states, actions, gamma, source)
    logits = torch.randn(2, count, states, actions, dtype=torch.float64, generator=source)
    return problems, *torch.softmax(2 * logits, -1)


@pytest.mark.parametrize(("states", "actions", "gamma"), SHAPES)
def test_values_are_the_fixed_point_of_bellman_iteration(states, actions, gamma):
    problems, policy, _ = drawn(states, actions, gamma)
    value = torch.zeros_like(problems.start)
    for _ in range(1200):
        action_value = (
            problems.reward + gamma * (problems.transition @ value[:, None, :, None])[..., 0]
        )
        value = (policy * action_value).sum(-1)
    solution = solve(problems, policy)
    torch.testing.assert_close(solution.value, value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        solution.advantage, action_value - value[..., None], rtol=1e-10, atol=1e-12
    )
    mean = (policy * solution.advantage).sum(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("states", "actions", "gamma"), SHAPES)
def test_visits_are_the_discounted_sum_over_time(states, actions, gamma):
    problems, policy, _ = drawn(states, actions, gamma)
    here, total = problems.start, torch.zeros_like(problems.start)
    for time in range(1200):
        total = total + (1 - gamma) * gamma**time * here
        here = torch.einsum("ms,msa,msat->mt", here, policy, problems.transition)
    visits = solve(problems, policy).visits
    torch.testing.assert_close(visits, total, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(visits.sum(-1), torch.ones(len(visits), dtype=torch.float64))


@pytest.mark.parametrize(("states", "actions", "gamma"), SHAPES)
def test_performance_difference_lemma(states, actions, gamma):
    problems, old, new = drawn(states, actions, gamma)
    before, after = solve(problems, old), solve(problems, new)
    gain = torch.einsum("ms,msa,msa->m", after.visits, new, before.advantage) / (1 - gamma)
    true = after.performance - before.performance
    torch.testing.assert_close(gain, true, atol=1e-12, rtol=1e-12)


def test_performance_is_the_mean_return_of_simulated_episodes():
    problems, policy, _ = drawn(3, 2, 0.8, count=1)
    source = torch.Generator().manual_seed(1)
    episodes, returns = 20_000, torch.zeros(20_000, dtype=torch.float64)
    state = torch.multinomial(problems.start[0], episodes, replacement=True, generator=source)
    for time in range(60):  # 0.8^60 is 2e-6
        action = torch.multinomial(policy[0][state], 1, generator=source)[:, 0]
        returns += 0.8**time * problems.reward[0][state, action]
        state = torch.multinomial(problems.transition[0][state, action], 1, generator=source)[:, 0]
    error = float(returns.std()) / math.sqrt(episodes)
    exact = float(solve(problems, policy).performance)
    assert abs(float(returns.mean()) - exact) < 4 * error


def test_a_problem_solved_by_hand():
    """X stays with probability p, else goes to Y for good, which pays 1 with probability q."""
    p, q, gamma = 0.1, 0.5, 0.9
    transition = torch.tensor([[[[0, 1], [1, 0]], [[0, 1], [0, 1]]]], dtype=torch.float64)
    reward = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.float64)
    start = torch.tensor([[1, 0]], dtype=torch.float64)
    policy = torch.tensor([[[1 - p, p], [1 - q, q]]], dtype=torch.float64)
    solution = solve(Problems(transition, reward, start, gamma), policy)
    in_y = q / (1 - gamma)
    in_x = gamma * (1 - p) / (1 - gamma * p) * in_y
    torch.testing.assert_close(solution.value[0].tolist(), [in_x, in_y])
    assert float(solution.performance) == pytest.approx(in_x)
    assert float(solution.visits[0, 0]) == pytest.approx((1 - gamma) / (1 - gamma * p))


def problem(**changes):
    parts = {
        "transition": torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64),
        "reward": torch.zeros(1, 2, 2, dtype=torch.float64),
        "start": torch.full((1, 2), 0.5, dtype=torch.float64),
        "gamma": 0.9,
    }
    return Problems(**parts | changes)


BAD = {
    "gamma": ({"gamma": 1.0}, r"\[0, 1\)"),
    "no number": ({"gamma": math.nan}, r"\[0, 1\)"),
    "sum": ({"transition": torch.full((1, 2, 2, 2), 0.4, dtype=torch.float64)}, "sum to 1"),
    "negative": ({"start": torch.tensor([[1.5, -0.5]], dtype=torch.float64)}, "probabilities"),
    "nan": ({"start": torch.full((1, 2), torch.nan, dtype=torch.float64)}, "probabilities"),
    "reward": ({"reward": torch.full((1, 2, 2), torch.inf, dtype=torch.float64)}, "finite"),
    "shape": ({"start": torch.full((1, 3), 1 / 3, dtype=torch.float64)}, r"start must be \(1, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_decision_problem_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        problem(**changes)


def test_what_is_no_policy_is_refused():
    with pytest.raises(ValueError, match="policy must be"):
        solve(problem(), torch.full((1, 2, 3), 1 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="sum to 1"):
        solve(problem(), torch.full((1, 2, 2), 0.4, dtype=torch.float64))
