"""The curves that reports draw: finite, and the weight is the slope of the value."""

import numpy as np
import pytest
import torch

from rgpo.core import recipes
from rgpo.core.objective import neutral_inputs
from rgpo.studies.curves import drawn_units, objective_curve


def stopped(objective) -> bool:
    """Whether the gradient is stopped through a factor of the value, or there is more than r.

    The slope of the drawn value is then not the weight.
    """
    d = torch.linspace(-0.7, 1, 40, dtype=torch.float64).view(-1, 1)
    step = 1e-6
    for sign in (1.0, -1.0):
        drawn = [drawn_units(objective, d + h, sign) for h in (step, 0, -step)]
        inputs = [neutral_inputs(objective, *unit) for unit in drawn]
        up, _, down = (
            objective.value(*unit, **given).sum(-1)
            for unit, given in zip(drawn, inputs, strict=True)
        )
        weight = objective.weight(*drawn[1], **inputs[1])[:, 0]
        if not torch.allclose((up - down) / (2 * step), weight, atol=1e-3):
            return True
    return False


def both_signs(curve):
    for sign, name in ((1, "pos"), (-1, "neg")):
        value, weight = getattr(curve, f"value_{name}"), getattr(curve, f"weight_{name}")
        yield sign, np.array(value), np.array(weight)


@pytest.mark.parametrize("name", recipes.names())
def test_the_weight_is_the_derivative_of_the_value(name):
    """By autograd: further log-ratios move with the log-probability."""
    recipe = recipes.get(name)
    curve = objective_curve(recipe)
    log_ratio = torch.log(torch.tensor(curve.ratio, dtype=torch.float64))
    assert 0 < curve.ratio[0] < 0.02
    assert curve.ratio[-1] == 3
    for sign, value, weight in both_signs(curve):
        log_ratio = log_ratio.view(-1, 1)
        shift = torch.zeros_like(log_ratio, requires_grad=True)
        inputs = neutral_inputs(recipe.objective, *drawn_units(recipe.objective, log_ratio, sign))
        inputs |= {k: v + shift for k, v in inputs.items() if k.endswith("log_ratio")}
        unit, advantage = drawn_units(recipe.objective, log_ratio + shift, sign)
        expected = recipe.objective.value(unit, advantage, **inputs).sum(-1)
        (slope,) = torch.autograd.grad(expected.sum(), shift)
        slope = slope.squeeze(-1)
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, expected.detach())
        np.testing.assert_allclose(weight, slope, atol=1e-9)
        assert np.abs(weight).max() > 0.02


@pytest.mark.parametrize("name", [r.name for r in recipes.recipes() if not stopped(r.objective)])
def test_the_weight_is_the_slope_of_the_value(name):
    """By central differences, apart from the corners of clips: at most two for each sign."""
    curve = objective_curve(recipes.get(name), points=3001)
    ratio = np.array(curve.ratio)
    fine = ratio[1:-1] > 0.02  # below, a step in the ratio is a large one in its logarithm
    for _, value, weight in both_signs(curve):
        slope = (value[2:] - value[:-2]) / (np.log(ratio[2:]) - np.log(ratio[:-2]))
        wrong = ~np.isclose(slope, weight[1:-1], rtol=5e-3, atol=5e-3) & fine
        assert wrong.sum() <= 4  # each corner lies between the two points of two differences
