"""Every recipe in words, from the registry: the table of docs/objectives/README.md."""

from collections.abc import Iterator

from rgpo.core import recipes
from rgpo.core.recipes import Recipe

_HEADINGS = (
    "recipe",
    "paper",
    "what it is",
    "needs",
    "sup \\|w\\|",
    "w(1) = A",
    "where formula and defaults come from",
)
_UNITS = {
    "batch": "the whole batch",
    "sequence": "whole sequences",
    "group": "all answers to a prompt",
}


def markdown() -> str:
    """One row per recipe, by name."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|"]
    lines += ["| " + " | ".join(_row(recipe)) + " |" for recipe in recipes.recipes()]
    return "\n".join(lines) + "\n"


def _row(recipe: Recipe) -> Iterator[str]:
    objective = recipe.objective
    supremum = objective.sup_weight
    yield f"`{recipe.name}`"
    yield recipe.paper
    yield recipe.summary.replace("|", "\\|")
    yield ", ".join(needs(recipe)) or "–"
    yield "∞" if supremum == float("inf") else f"{supremum:.4g}"
    yield "yes" if objective.unit_slope else "no"
    yield recipe.confidence.replace("|", "\\|")


def needs(recipe: Recipe) -> Iterator[str]:
    """What a trainer has to supply beyond log-probs and advantages, in words."""
    if recipe.level != "token":
        yield f"{recipe.level} ratio"
    if recipe.objective.scope != "element":
        yield _UNITS[recipe.objective.scope]
    if recipe.data == "expert":
        yield "expert data"
    yield from (name for name in recipe.objective.needs if name != "mask")
    if recipe.kl is not None:
        yield "KL penalty"
    if recipe.step != "gradient":
        yield f"{recipe.step} step"
