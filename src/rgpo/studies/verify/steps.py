"""Random steps of policies on random decision problems, with what is true and promised."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.certificate import improvement_bound
from rgpo.core.objectives.rgpo import RGPO
from rgpo.studies.tabular import Problems, random_problems, solve
from rgpo.studies.verify.finding import generator, normal

STATES, ACTIONS = range(2, 8), range(2, 6)

LOWEST_STEP, HIGHEST_STEP = 1e-3, 5.0
"""Of the change of the logits, drawn uniformly in the logarithm."""

SHARPNESS = (2.0, 4.0, 10.0, 20.0)
"""Gates whose bound is computed; figures and counts are those of the default, 10."""


@dataclass(frozen=True)
class Steps:
    """N steps of policies, each on its own decision problem, with what is true and promised."""

    size: Tensor
    """(N,): of the step in logits."""

    along: Tensor
    """(N,) bool: whether it went along the advantage; else it went anywhere."""

    true: Tensor
    """(N,): J(pi) - J(pi_old)."""

    bound: Mapping[float, Tensor]
    """(N,) for each sharpness: the repaired lower bound on `true`."""

    published: Mapping[float, Tensor]
    """The same without the change of the state distribution."""


def random_steps(gammas: int, count: int) -> Steps:
    """Steps on `count` random problems of every shape for each of `gammas` discounts.

    States, actions, gamma and step size as in docs/theory.md section 9; half of the steps go along
    the advantage (the logits of pi are those of pi_old + size * A), half anywhere.
    """
    source, parts = generator(0), []
    for states in STATES:
        for actions in ACTIONS:
            for _ in range(gammas):
                gamma = 0.5 + 0.47 * float(torch.rand((), generator=source))
                problems = random_problems(count, states, actions, gamma, source)
                parts += [_step(problems, along=along, source=source) for along in (True, False)]
    bounds = [part.bound for part in parts], [part.published for part in parts]
    joined = [{k: torch.cat([b[k] for b in side]) for k in SHARPNESS} for side in bounds]
    size, along, true = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("size", "along", "true")
    )
    return Steps(size, along, true, *joined)


def _step(problems: Problems, *, along: bool, source: torch.Generator) -> Steps:
    shape = problems.reward.shape
    logits = normal(*shape, source=source)
    old = torch.softmax(logits, -1)
    solution = solve(problems, old)
    direction = solution.advantage if along else normal(*shape, source=source)
    exponent = torch.rand(shape[0], dtype=torch.float64, generator=source)
    size = LOWEST_STEP * (HIGHEST_STEP / LOWEST_STEP) ** exponent
    new = torch.softmax(logits + size[:, None, None] * direction, -1)
    true = solve(problems, new).performance - solution.performance
    bound, published = {}, {}
    for k in SHARPNESS:
        found = improvement_bound(
            RGPO(sharpness=k), old, new, solution.advantage, solution.visits, problems.gamma
        )
        bound[k], published[k] = found.bound, found.bound + found.shift
    return Steps(size, torch.full(size.shape, along), true, bound, published)
