"""The curves of an objective's value g and weight w against the ratio, for reports and plots."""

import torch

from rgpo.core.recipes import Recipe
from rgpo.runs.report import ObjectiveCurve


def objective_curve(recipe: Recipe, *, highest: float = 3.0, points: int = 301) -> ObjectiveCurve:
    """Value and weight for A = +1 and A = -1 on ratios in (0, highest].

    A second ratio, where the recipe needs one, is held at 1.
    """
    ratio = torch.linspace(highest / points, highest, points, dtype=torch.float64)
    log_ratio = torch.log(ratio)
    inputs = dict.fromkeys(recipe.objective.needs, torch.zeros_like(log_ratio))
    found: dict[str, list[float]] = {"ratio": ratio.tolist()}
    for name, sign in (("pos", 1.0), ("neg", -1.0)):
        advantage = torch.full_like(log_ratio, sign)
        value = recipe.objective.value(log_ratio, advantage, **inputs)
        weight = recipe.objective.weight(log_ratio, advantage, **inputs)
        found |= {f"value_{name}": value.tolist(), f"weight_{name}": weight.tolist()}
    return ObjectiveCurve(**found)
