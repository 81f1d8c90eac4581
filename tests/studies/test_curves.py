"""The curves that reports draw: finite, and the weight is the slope of the value."""

import numpy as np
import pytest
import torch

from rgpo.core import recipes
from rgpo.studies.curves import objective_curve

STOPPED = {"cispo", "gipo"}
"""Their gradient is stopped through a factor of the value: its slope is more than the weight."""


def both_signs(curve):
    for sign, name in ((1, "pos"), (-1, "neg")):
        value, weight = getattr(curve, f"value_{name}"), getattr(curve, f"weight_{name}")
        yield sign, np.array(value), np.array(weight)


@pytest.mark.parametrize("name", recipes.names())
def test_the_weight_is_the_derivative_of_the_value(name):
    """By autograd: a second ratio, held at 1 in the picture, moves with the log-probability."""
    recipe = recipes.get(name)
    curve = objective_curve(recipe)
    log_ratio = torch.log(torch.tensor(curve.ratio, dtype=torch.float64))
    assert 0 < curve.ratio[0] < 0.02
    assert curve.ratio[-1] == 3
    for sign, value, weight in both_signs(curve):
        shift = torch.zeros_like(log_ratio, requires_grad=True)
        inputs = dict.fromkeys(recipe.objective.needs, shift)
        advantage = torch.full_like(log_ratio, sign)
        expected = recipe.objective.value(log_ratio + shift, advantage, **inputs)
        (slope,) = torch.autograd.grad(expected.sum(), shift)
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, expected.detach())
        np.testing.assert_allclose(weight, slope, atol=1e-9)
        assert np.abs(weight).max() > 0.1


@pytest.mark.parametrize(
    "name", [r.name for r in recipes.recipes() if not r.objective.needs and r.name not in STOPPED]
)
def test_the_weight_is_the_slope_of_the_value(name):
    """By central differences, apart from the corners of clips: at most two for each sign."""
    curve = objective_curve(recipes.get(name), points=3001)
    ratio = np.array(curve.ratio)
    fine = ratio[1:-1] > 0.02  # below, a step in the ratio is a large one in its logarithm
    for _, value, weight in both_signs(curve):
        slope = (value[2:] - value[:-2]) / (np.log(ratio[2:]) - np.log(ratio[:-2]))
        wrong = ~np.isclose(slope, weight[1:-1], rtol=5e-3, atol=5e-3) & fine
        assert wrong.sum() <= 4  # each corner lies between the two points of two differences
