"""Recipes: a published system by name, as the pieces of the core that it composes.

Files of `rgpo.core.objectives` call `register`; nothing else has to be touched to add one
(docs/add-an-objective.md).
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective
from rgpo.core.ratio import Level
from rgpo.core.reduce import Reduction


@dataclass(frozen=True)
class Recipe:
    """A name, a paper, and what is composed."""

    name: str
    """Name on the command line, in lower case with dashes."""

    objective: Objective
    """The weight on the log-ratio, with the recipe's defaults."""

    paper: str
    """arXiv id, or another way to find the source."""

    summary: str
    """One line that tells this recipe from its neighbours."""

    level: Level = "token"
    """Where the ratio is formed. In control a token is one action."""

    reduction: Reduction = "token-mean"
    """How per-token surrogates become one number in language tasks."""

    kl: KLPenalty | None = None
    """KL(old || new) penalty added to the loss; adaptive when it has a target."""

    step: Literal["gradient", "natural-gradient", "clip-normalized"] = "gradient"
    """`natural-gradient`: conjugate gradient and line search on a KL constraint (TRPO).
    `clip-normalized`: the gradient over the norm of what clipping took from it (S-PPO)."""

    data: Literal["policy", "expert"] = "policy"
    """Whose samples it learns from: a policy's rollouts, old ones included, or an expert's, a
    second stream beside a recipe of the first kind."""

    anchor_decay: float = 0.0
    """Which policy `proximal_log_ratio` refers to, where the objective needs it: 0 is the policy
    at the start of the update, otherwise the exponentially weighted average of the parameters
    after each optimiser step with this decay (`rgpo.core.anchor`)."""

    anchor_reset: float = 0.0
    """The average starts again at the present policy after an update in which less than this
    share of the elements exerted a force; 0: never."""

    confidence: str = "paper"
    """Where the formula and the defaults come from."""

    def hyper_parameters(self) -> dict[str, float | str | None]:
        """Every field that `configure` takes, with its present value."""
        found = {f.name: getattr(self.objective, f.name) for f in fields(self.objective)}  # type: ignore[arg-type]
        if self.kl is not None:
            found |= {"kl_coefficient": self.kl.coefficient, "kl_target": self.kl.target}
        return found

    def configure(self, **changes: float | str | None) -> "Recipe":
        """A copy with other hyper-parameters; ValueError for one that this recipe does not have.

        `kl_coefficient` and `kl_target` put a KL penalty on any recipe that takes gradient steps.
        """
        own = {f.name for f in fields(self.objective)}  # type: ignore[arg-type]
        kl = {"kl_coefficient", "kl_target"}
        for name in changes:
            if name not in own | kl:
                raise ValueError(
                    f"recipe {self.name!r} has no hyper-parameter {name!r}: "
                    f"choose from {', '.join(sorted(own | kl))}"
                )
        objective = replace(self.objective, **{k: v for k, v in changes.items() if k in own})  # type: ignore[type-var]
        penalty = self.kl
        if kl & changes.keys():
            penalty = self._penalty(changes)
        return replace(self, objective=objective, kl=penalty)

    def _penalty(self, changes: dict[str, float | str | None]) -> KLPenalty | None:
        old = self.kl or KLPenalty(1.0)
        coefficient = changes.get("kl_coefficient", old.coefficient)
        target = changes.get("kl_target", old.target)
        if self.step == "natural-gradient":
            raise ValueError(f"recipe {self.name!r} constrains the KL itself: drop the KL penalty")
        if coefficient is None or coefficient == 0:
            return None
        for name, number in (("kl_coefficient", coefficient), ("kl_target", target)):
            if isinstance(number, str):
                raise ValueError(f"{name} must be a number, got {number!r}")  # noqa: TRY004
        target = None if target is None else float(target)
        return replace(old, coefficient=float(coefficient), target=target)


_REGISTRY: dict[str, Recipe] = {}


def register(*recipes: Recipe) -> None:
    """Make recipes known by name; a name that is taken raises ValueError."""
    for recipe in recipes:
        if recipe.name in _REGISTRY:
            raise ValueError(f"recipe {recipe.name!r} is registered twice")
        _REGISTRY[recipe.name] = recipe


def _load() -> dict[str, Recipe]:
    package = importlib.import_module("rgpo.core.objectives")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _REGISTRY


def names() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_load())


def recipes() -> Iterator[Recipe]:
    """Every registered recipe, by name."""
    known = _load()
    return (known[name] for name in sorted(known))


def get(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest names if there is none."""
    known = _load()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown recipe {name!r}: {hint}`rgpo objectives` lists them all")
    return known[name]
