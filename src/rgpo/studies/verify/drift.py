"""Small bandits on which many epochs over one batch move the policy, and what may hold it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core import recipes
from rgpo.core.kl import categorical_kl
from rgpo.core.objective import Objective, safe_ratio
from rgpo.studies.verify.finding import generator, normal

CONTEXTS, ACTIONS, FEATURES, SAMPLES = 16, 5, 6, 128
"""Fewer features than contexts: changing the policy in one context changes it in others."""

LEARNING_RATE = 0.03


@dataclass(frozen=True)
class HardRejection(Objective):
    """w = r A for |r - 1| <= epsilon, else 0, whatever the sign of A: the gate's sharp limit."""

    epsilon: float = 0.2
    """Half-width."""

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.clamp(safe_ratio(log_ratio), 1 - self.epsilon, 1 + self.epsilon) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return torch.where((ratio - 1).abs() <= self.epsilon, ratio, 0) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1 + self.epsilon


@dataclass(frozen=True)
class Form:
    """A way to hold the policy: an objective, and the coefficient of an exact KL penalty."""

    objective: Objective
    """The weight of a sample."""

    kl: float = 0.0
    """Of KL(old || new)."""

    def force(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """The weight and the penalty's pull on a sample of the old policy, -kl (r - 1)."""
        return self.objective.weight(log_ratio, advantage) - self.kl * torch.expm1(log_ratio)


def forms() -> dict[str, Form]:
    """What is compared."""
    own = {
        "no clip": "importance",
        "two-sided gate": "rgpo-gate",
        "outward-only gate": "rgpo-signed",
        "PPO's clip": "ppo",
        "gate with pull-back": "rgpo-pullback",
    }
    found = {label: Form(recipes.get(name).objective) for label, name in own.items()}
    found["two-sided rejection"] = Form(HardRejection())
    found["gate + KL penalty"] = Form(recipes.get("rgpo").objective, kl=1.0)
    return found


@dataclass(frozen=True)
class Problem:
    """R contextual bandits with one batch of samples each; softmax policies of linear logits."""

    features: Tensor
    """(R, C, F)."""

    parameters: Tensor
    """(R, F, A): of the policy that collected the batch."""

    chosen: Tensor
    """(R, N): flat index of context and action of each sample."""

    advantage: Tensor
    """(R, N): noisy, of mean 0 and variance 1 over the batch."""


def random_problem(runs: int, seed: int) -> Problem:
    """Standard normal features, parameters and advantages; noise of the same size on the latter."""
    source = generator(seed)
    features = normal(runs, CONTEXTS, FEATURES, source=source) / FEATURES**0.5
    parameters = normal(runs, FEATURES, ACTIONS, source=source)
    probability = torch.softmax(features @ parameters, -1)
    context = torch.randint(CONTEXTS, (runs, SAMPLES), generator=source)
    own = probability.gather(1, context[..., None].expand(-1, -1, ACTIONS))
    action = torch.multinomial(own.flatten(0, 1), 1, generator=source).view(runs, SAMPLES)
    chosen = context * ACTIONS + action
    true = normal(runs, CONTEXTS, ACTIONS, source=source)
    true = true - (probability * true).sum(-1, keepdim=True)
    seen = true.flatten(1).gather(1, chosen) + normal(runs, SAMPLES, source=source)
    seen = seen - seen.mean(-1, keepdim=True)
    return Problem(features, parameters, chosen, seen / seen.std(-1, keepdim=True))


def path(form: Form, problem: Problem, epochs: int, displaced: Tensor | float = 0.0) -> Tensor:
    """Exact KL(old || new), (epochs + 1, R), of full-batch Adam from the displaced policy."""
    old = problem.features @ problem.parameters
    start = torch.log_softmax(old, -1).flatten(1).gather(1, problem.chosen)
    parameters = (problem.parameters + displaced).clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=LEARNING_RATE)
    history = []
    for epoch in range(epochs + 1):
        logits = problem.features @ parameters
        kl = categorical_kl(old, logits).mean(-1)
        history.append(kl.detach())
        if epoch == epochs:
            break
        log_ratio = torch.log_softmax(logits, -1).flatten(1).gather(1, problem.chosen) - start
        surrogate = form.objective.surrogate(log_ratio, problem.advantage).mean(-1)
        # a sum over runs: each has its own parameters, and Adam treats elements alone
        (gradient,) = torch.autograd.grad((form.kl * kl - surrogate).sum(), parameters)
        parameters.grad = gradient
        optimizer.step()
    return torch.stack(history)
