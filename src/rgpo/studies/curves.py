"""The curves of an objective's value g and weight w against the ratio, for reports and plots."""

import torch

from rgpo.core.objective import neutral_inputs
from rgpo.core.recipes import Recipe
from rgpo.runs.report import ObjectiveCurve


def objective_curve(recipe: Recipe, *, highest: float = 3.0, points: int = 300) -> ObjectiveCurve:
    """Value and weight for A = +1 and A = -1 on ratios in (0, highest], 1 among them.

    Further inputs say nothing (`neutral_inputs`), and every point is a unit of its own.
    """
    ratio = torch.linspace(highest / points, highest, points, dtype=torch.float64)
    log_ratio = torch.log(ratio).unsqueeze(-1)
    found: dict[str, list[float]] = {"ratio": ratio.tolist()}
    for name, sign in (("pos", 1.0), ("neg", -1.0)):
        advantage = torch.full_like(log_ratio, sign)
        inputs = neutral_inputs(recipe.objective, log_ratio, advantage)
        value = recipe.objective.value(log_ratio, advantage, **inputs)
        weight = recipe.objective.weight(log_ratio, advantage, **inputs)
        found[f"value_{name}"] = value.squeeze(-1).tolist()
        found[f"weight_{name}"] = weight.squeeze(-1).tolist()
    return ObjectiveCurve(**found)
