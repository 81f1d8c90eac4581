"""The curves of an objective's value g and weight w against the ratio, for reports and plots."""

import torch
from torch import Tensor

from rgpo.core.objective import Objective, neutral_inputs
from rgpo.core.recipes import Recipe
from rgpo.runs.report import ObjectiveCurve


def objective_curve(recipe: Recipe, *, highest: float = 3.0, points: int = 300) -> ObjectiveCurve:
    """Value and weight for A = +1 and A = -1 on ratios in (0, highest], 1 among them.

    Further inputs say nothing (`neutral_inputs`), and every point is a unit of its own
    (`drawn_units`).
    """
    ratio = torch.linspace(highest / points, highest, points, dtype=torch.float64)
    found: dict[str, list[float]] = {"ratio": ratio.tolist()}
    for name, sign in (("pos", 1.0), ("neg", -1.0)):
        units = drawn_units(recipe.objective, torch.log(ratio).unsqueeze(-1), sign)
        inputs = neutral_inputs(recipe.objective, *units)
        found[f"value_{name}"] = recipe.objective.value(*units, **inputs).sum(-1).tolist()
        found[f"weight_{name}"] = recipe.objective.weight(*units, **inputs)[:, 0].tolist()
    return ObjectiveCurve(**found)


def drawn_units(objective: Objective, log_ratio: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Log-ratios and advantages of the units that are drawn at `log_ratio` (N, 1).

    An element or a sequence stands alone. Where sequences of a prompt are compared, there is a
    second one at ratio 1 with the opposite score.
    """
    advantage = torch.full_like(log_ratio, sign)
    if objective.scope != "group":
        return log_ratio, advantage
    return (
        torch.cat([log_ratio, torch.zeros_like(log_ratio)], -1),
        torch.cat([advantage, -advantage], -1),
    )
