"""What every adapter needs: a host and a recipe that fit, or the sentence that says why not."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rgpo.core import recipes
from rgpo.core.loss import policy_loss
from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe
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
    adapts: bool = True,
) -> Recipe:
    """The recipe with its hyper-parameters; RgpoError for one that the host cannot feed.

    `gives` are the inputs of `rgpo.core.objective.INPUTS` that the host has. `whole_batch` says
    whether a call sees all samples of an optimiser step, `sequences` whether there are any,
    `adapts` whether the adapter can change the recipe from update to update.
    """
    try:
        found = recipes.get(recipe) if isinstance(recipe, str) else recipe
        found = found.configure(**(options or {}))
    except ValueError as error:
        raise RgpoError(str(error)) from None
    reason = _unfit(found, gives, whole_batch, sequences)
    annealed = found.kl is not None and found.kl.annealed
    if not adapts and (annealed or type(found.objective).adapt is not Objective.adapt):
        reason = "it changes from update to update, which `rgpo train` and SB3 can follow"
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

    `metrics` holds the diagnostics and, for a recipe with a penalty, `kl`: KL(old || new) of the
    whole update; `progress` is the share of training that is done.
    """
    objective = recipe.objective.adapt({**metrics, "progress": progress})
    penalty = None if recipe.kl is None else recipe.kl.adapt(metrics["kl"])
    return replace(recipe, objective=objective, kl=penalty)


def diagnostics(
    recipe: Recipe,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor | None,
) -> dict[str, float]:
    """The core's diagnostics of (B,) samples, and with them the mean exact KL where it is known."""
    with torch.no_grad():
        found = policy_loss(recipe, log_prob, behavior_log_prob, advantage, kl=kl).diagnostics
    numbers = {name: float(number) for name, number in found.items()}
    if kl is not None:
        numbers["kl"] = float(kl.detach().mean())
    if recipe.kl is not None:
        numbers["kl_coefficient"] = recipe.kl.coefficient
    return numbers


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over minibatches, those left out where it was not measured (NaN)."""
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {name: float(column.nanmean()) for name, column in columns.items()}


def mean_over_ranks(number: float, device: torch.device | str) -> float:
    """The mean over the processes of a distributed run, so that they all adapt alike."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return number
    total = torch.tensor(number, device=device)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def needs_kl(recipe: Recipe) -> bool:
    """Whether the recipe looks at the exact KL of a minibatch."""
    return recipe.kl is not None or "kl" in recipe.objective.needs


def kl_state(recipe: Recipe) -> dict[str, float]:
    """What a checkpoint of the host must hold of the recipe: the penalty's present coefficient."""
    return {} if recipe.kl is None else {"kl_coefficient": recipe.kl.coefficient}


def with_kl_state(recipe: Recipe, state: Mapping[str, float]) -> Recipe:
    """The recipe with what `kl_state` returned; unchanged where it has no penalty."""
    return recipe if recipe.kl is None else recipe.configure(**state)


class _InsteadOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return log_prob.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, ctx.one


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
    recipe: Recipe,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    progress: float = 0.0,
    **kl: Tensor,
) -> Tensor:
    """Minus the mean surrogate of (B,) samples, plus the recipe's KL penalty.

    `kl` = KL(old || new) and `reverse_kl`, both (B,) and exact, are given where `needs_kl`.
    """
    objective, penalty = recipe.objective, recipe.kl
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    given = {"log_prob": log_prob, "mask": mask, **kl}
    needed = {name: given[name].detach() for name in objective.needs}
    surrogate = objective.surrogate(log_prob - behavior_log_prob, advantage, **needed)
    loss = -surrogate.mean()
    if penalty is not None:
        weight = penalty.weight(progress)
        loss = loss + weight * kl["kl" if penalty.direction == "forward" else "reverse_kl"].mean()
    return loss
