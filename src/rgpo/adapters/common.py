"""What every adapter needs: a host and a recipe that fit, or the sentence that says why not."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rgpo.core import recipes
from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe
from rgpo.core.reduce import token_mean
from rgpo.errors import RgpoError

ELSEWHERE = {
    "reference_log_ratio": "the trainers of language models (TRL, verl, TorchRL's GRPO)",
    "proximal_log_ratio": "`rgpo train --staleness` and the trainers of language models",
    "log_prob": "tasks with discrete actions, and language models",
    "kl": "`rgpo train`, Stable-Baselines3, RLlib, rsl_rl and skrl",
    "median_advantage": "`rgpo train`",
}
"""Which trainers can feed each input of `rgpo.core.objective.INPUTS`."""


class HostError(RgpoError, ImportError):
    """The host trainer is missing, or of a version that the adapter was not tested with."""


def require_version(package: str, low: str, below: str, extra: str) -> None:
    """HostError unless `package` is installed in a version of [low, below)."""
    install = f'`pip install "rgpo[{extra}]"`'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise HostError(
            f"this adapter needs {package}, which is not installed: {install}"
        ) from None
    if not _release(low) <= _release(found) < _release(below):
        raise HostError(
            f"this adapter supports {package} from {low} to below {below}, and {found} is "
            f"installed: {install}"
        )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def chosen(
    recipe: Recipe | str,
    options: Mapping[str, float | str | None] | None,
    *,
    host: str,
    gives: Collection[str],
    whole_batch: bool = True,
    sequences: bool = False,
) -> Recipe:
    """The recipe with its hyper-parameters; RgpoError for one that the host cannot feed.

    `gives` are the inputs of `rgpo.core.objective.INPUTS` that the host has. `whole_batch` says
    whether a call sees all samples of an optimiser step, `sequences` whether there are any.
    """
    try:
        found = recipes.get(recipe) if isinstance(recipe, str) else recipe
        found = found.configure(**(options or {}))
    except ValueError as error:
        raise RgpoError(str(error)) from None
    reason = _unfit(found, gives, whole_batch, sequences)
    if reason:
        raise RgpoError(f"recipe {found.name!r} cannot run in {host}: {reason}")
    return found


def _unfit(
    recipe: Recipe, gives: Collection[str], whole_batch: bool, sequences: bool
) -> str | None:
    objective = recipe.objective
    missing = [name for name in objective.needs if name not in {*gives, "mask"}]
    if missing:
        return f"it needs {missing[0]}, which {ELSEWHERE[missing[0]]} can feed"
    if recipe.step != "gradient":
        return f"it takes {recipe.step} steps: `rgpo train` does"
    if objective.scope == "group":
        return "it compares the sequences of one prompt: rgpo.core.loss.group_loss does"
    if not sequences and (recipe.level != "token" or objective.scope == "sequence"):
        return "it forms one ratio per sequence, which the trainers of language models have"
    if objective.scope == "batch" and not whole_batch:
        return "it weighs all samples of an optimiser step together: `rgpo train` does"
    if type(objective).learning_rate_scale is not Objective.learning_rate_scale:
        return "it sets the learning rate itself: call its learning_rate_scale in a loop of yours"
    return None


def adapted(recipe: Recipe, metrics: Mapping[str, float], progress: float) -> Recipe:
    """The recipe for the next update: its objective and its KL penalty answer what was measured.

    `metrics` holds the diagnostics and `kl`, the KL(old || new) of the whole update; `progress` is
    the share of training that is done.
    """
    objective = recipe.objective.adapt({**metrics, "progress": progress})
    penalty = None if recipe.kl is None else recipe.kl.adapt(metrics["kl"])
    return replace(recipe, objective=objective, kl=penalty)


class _InsteadOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        return log_prob.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, torch.ones((), dtype=gradient.dtype, device=gradient.device)


def carrying(log_prob: Tensor, loss: Tensor) -> Tensor:
    """`log_prob`, through which the gradient of the scalar `loss` flows instead of the host's.

    A host without a loss hook keeps its whole update and all its metrics: it computes its own
    surrogate from true log-probs, and on the way back what arrives here, NaN included, is dropped
    for the gradient of `loss`, which must hold everything that depends on log_prob. Right where
    the host adds its mean surrogate to the total with factor 1 and calls backward once.
    """
    return _InsteadOf.apply(log_prob, loss)


@contextmanager
def replaced(owner: object, **methods: Callable[..., Any]) -> Iterator[None]:
    """Other methods on one object, as long as the context lasts."""
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)


def minibatch_loss(
    recipe: Recipe, log_ratio: Tensor, advantage: Tensor, progress: float = 0.0, **inputs: Tensor
) -> Tensor:
    """Minus the mean surrogate of (B,) samples, plus the recipe's KL penalty.

    `inputs` may hold log_prob, mask, the exact kl = KL(old || new) and reverse_kl, all (B,).
    """
    objective, penalty = recipe.objective, recipe.kl
    mask = inputs.setdefault("mask", torch.ones_like(log_ratio, dtype=torch.bool))
    needed = {name: inputs[name].detach() for name in objective.needs}
    loss = -token_mean(objective.surrogate(log_ratio, advantage, **needed), mask)
    if penalty:
        kl = inputs["kl" if penalty.direction == "forward" else "reverse_kl"]
        loss = loss + penalty.weight(progress) * token_mean(kl, mask)
    return loss
