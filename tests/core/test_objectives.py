"""The laws of the core, for every registered recipe: a new one is tested the moment it exists."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgpo.core import recipes
from rgpo.core.objective import INPUTS, SAFE_LOG_RATIO, Objective

RECIPES = list(recipes.recipes())
OBJECTIVES = [pytest.param(r.objective, id=r.name) for r in RECIPES]
EXTREME = [-1e4, -400.0, -90.0, -40.0, -1e-8, 0.0, 1e-8, 40.0, 89.0, 400.0, 1e4]


def extra_inputs(objective: Objective, log_ratio: torch.Tensor, offset: float = 0.3) -> dict:
    """Further log-ratios move with the same log-prob: log_ratio plus a constant."""
    spread = torch.linspace(-1, 1, log_ratio.numel(), dtype=log_ratio.dtype).view_as(log_ratio)
    every = {
        "reference_log_ratio": log_ratio + offset,
        "proximal_log_ratio": log_ratio + offset,
        "log_prob": (log_ratio.detach() - offset).clamp(max=-1e-3),
        "kl": 0.03 * (1 + spread),
        "median_advantage": spread + offset,
        "mask": torch.ones_like(log_ratio, dtype=torch.bool),
    }
    return {name: every[name] for name in objective.needs}


def weight_on_grid(objective: Objective, log_ratio: torch.Tensor, sign: float) -> torch.Tensor:
    """|w| with A = sign on the grid of the log-ratio and, where needed, of a second one.

    Objectives that see a unit get units of one element.
    """
    second = [n for n in objective.needs if n.endswith("log_ratio")]
    shape = (-1, 1, 1) if second else (-1, 1)
    d = log_ratio.view(shape)
    if second:
        d = d.expand(-1, len(log_ratio), -1)
    inputs = extra_inputs(objective, d)
    if second:
        inputs |= dict.fromkeys(second, log_ratio.view(1, -1, 1).expand_as(d))
    return objective.weight(d, torch.full_like(d, sign), **inputs).abs()


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=60, deadline=None)
@given(
    log_ratio=st.lists(st.floats(-6, 6), min_size=1, max_size=20),
    advantage=st.floats(-5, 5),
    offset=st.floats(-2, 2),
)
def test_weight_is_the_derivative_of_value(objective, log_ratio, advantage, offset):
    d = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    a = torch.full_like(d, advantage).detach()
    value = objective.value(d, a, **extra_inputs(objective, d, offset))
    (gradient,) = torch.autograd.grad(value.sum(), d)
    with torch.no_grad():
        weight = objective.weight(d, a, **extra_inputs(objective, d, offset))
    torch.testing.assert_close(weight, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
def test_the_law_holds_for_advantages_of_both_signs_and_masked_elements(objective, scale):
    generator = torch.Generator().manual_seed(0)
    d, a = torch.randn(2, 40, 7, generator=generator, dtype=torch.float64)
    d, mask = (d * scale).requires_grad_(), torch.rand(40, 7, generator=generator) < 0.7
    inputs = extra_inputs(objective, d)
    if "mask" in inputs:
        inputs["mask"] = mask
    value = torch.where(mask, objective.value(d, a, **inputs), 0)
    (gradient,) = torch.autograd.grad(value.sum(), d)
    with torch.no_grad():
        weight = torch.where(mask, objective.weight(d, a, **inputs), 0)
    torch.testing.assert_close(weight, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_surrogate_has_the_exact_value_and_gradient(objective, advantage):
    d = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    a = torch.full_like(d, advantage).detach()
    surrogate = objective.surrogate(d, a, **extra_inputs(objective, d))
    (gradient,) = torch.autograd.grad(surrogate.sum(), d)
    with torch.no_grad():
        inputs = extra_inputs(objective, d)
        torch.testing.assert_close(surrogate.detach(), objective.value(d, a, **inputs))
        torch.testing.assert_close(gradient, objective.weight(d, a, **inputs))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_everything_is_finite_at_the_extremes(objective, dtype, advantage):
    d = torch.tensor(EXTREME).to(dtype).float().requires_grad_()
    a = torch.full_like(d, advantage).detach()
    for offset in (0.0, -1e4, 1e4):
        inputs = extra_inputs(objective, d.detach(), offset)
        surrogate = objective.surrogate(d, a, **inputs)
        (gradient,) = torch.autograd.grad(surrogate.sum(), d)
        assert torch.isfinite(surrogate).all(), surrogate
        assert torch.isfinite(gradient).all(), gradient


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autograd_of_value_is_finite_too(objective):
    """`value` saturates its ratio, so even a naive user of it gets no NaN."""
    d = torch.tensor(EXTREME, requires_grad=True)
    a = torch.full_like(d, -1.0).detach()
    (gradient,) = torch.autograd.grad(objective.value(d, a, **extra_inputs(objective, d)).sum(), d)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sup_weight_is_the_numerical_supremum(objective):
    """Finite: no point above it, and some point within 0.1% of it. Infinite: it grows past 1e6."""
    size = 1200 if objective.needs else 200_000
    ratio = torch.cat([torch.linspace(1e-4, 4, size), torch.linspace(4, 300, size // 4)]).double()
    log_ratio = ratio.log()
    if math.isinf(objective.sup_weight):  # 1e8: those that grow with the log-ratio
        log_ratio = torch.tensor([7.0, 12.0, 16.0, 21.0, 1e8], dtype=torch.float64)
    largest = max(float(weight_on_grid(objective, log_ratio, sign).max()) for sign in (1.0, -1.0))
    if objective.scope != "element":  # its supremum may need more than one element
        assert largest <= objective.sup_weight * (1 + 1e-9)
    elif math.isinf(objective.sup_weight):
        assert largest > 1e6
    else:
        assert largest <= objective.sup_weight * (1 + 1e-9)
        assert largest >= objective.sup_weight * 0.999


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("advantage", [1.7, -0.4])
def test_unit_slope_means_weight_equals_advantage_at_ratio_one(objective, advantage):
    d = torch.zeros(3, dtype=torch.float64)
    a = torch.full_like(d, advantage)
    inputs = extra_inputs(objective, d, 0.0)
    weight = objective.weight(d, a, **inputs)
    slope_is_one = bool(torch.allclose(weight, a, rtol=1e-12))
    assert slope_is_one == objective.unit_slope


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shape_and_dtype_are_kept(objective):
    for dtype in (torch.float32, torch.float64):
        d = torch.linspace(-2, 2, 18, dtype=dtype).view(3, 6)
        a = torch.linspace(-1, 1, 18, dtype=dtype).view(3, 6).flip(0)
        inputs = extra_inputs(objective, d)
        for found in (objective.weight(d, a, **inputs), objective.value(d, a, **inputs)):
            assert found.dtype == dtype
            assert found.shape == d.shape


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_homogeneous_means_that_the_weight_is_proportional_to_the_advantage(objective):
    d = torch.linspace(-2, 2, 9, dtype=torch.float64)
    a = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1, 0.0, 0.7, -0.9, -4.0], dtype=torch.float64)
    inputs = extra_inputs(objective, d)
    weight, thrice = (objective.weight(d, c * a, **inputs) for c in (1, 3))
    proportional = torch.allclose(thrice, 3 * weight, rtol=1e-9, atol=1e-12)
    vanishes = torch.count_nonzero(objective.weight(d, 0 * a, **inputs)) == 0
    assert bool(proportional and vanishes) == objective.homogeneous


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_units_do_not_act_on_each_other(objective):
    """Only the elements of one unit, along the last axis, see each other."""
    d = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    a = torch.linspace(1.4, -1, 12, dtype=torch.float64).view(2, 6)
    inputs = extra_inputs(objective, d)
    whole = objective.weight(d, a, **inputs)
    for row in range(2):
        alone = objective.weight(d[row], a[row], **{k: v[row] for k, v in inputs.items()})
        torch.testing.assert_close(alone, whole[row])
    if objective.scope == "element":
        one = objective.weight(d[0, :1], a[0, :1], **{k: v[0, :1] for k, v in inputs.items()})
        torch.testing.assert_close(one, whole[0, :1])


@pytest.mark.parametrize("objective", [p for p in OBJECTIVES if p.values[0].scope != "element"])
def test_masked_elements_of_a_unit_have_no_influence(objective):
    d = torch.tensor([0.3, -0.5, 1.2, -0.1], dtype=torch.float64)
    a = torch.tensor([1.0, -1.0, 0.5, -0.4], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    inputs = extra_inputs(objective, d)
    if "mask" not in inputs:
        pytest.fail("an objective with a scope needs the mask")
    inputs["mask"] = mask
    weight = objective.weight(d, a, **inputs)
    other = objective.weight(torch.where(mask, d, 7.0), torch.where(mask, a, -9.0), **inputs)
    torch.testing.assert_close(weight[mask], other[mask])


def test_every_input_that_is_needed_is_documented():
    for recipe in RECIPES:
        assert set(recipe.objective.needs) <= set(INPUTS), recipe.name


def test_every_recipe_configures_each_hyper_parameter_and_refuses_others():
    for recipe in RECIPES:
        for name, number in recipe.hyper_parameters().items():
            assert recipe.configure(**{name: number}) == recipe
        with pytest.raises(ValueError, match="no hyper-parameter 'sharpnes'"):
            recipe.configure(sharpnes=3.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_number_that_makes_no_sense_is_refused(objective):
    for field in fields(objective):
        if isinstance(getattr(objective, field.name), float):
            for nonsense in (-1.0, float("nan"), float("inf")):
                with pytest.raises(ValueError, match=field.name):
                    replace(objective, **{field.name: nonsense})


def test_unknown_recipe_suggests_a_near_one():
    with pytest.raises(ValueError, match=r"did you mean .*rgpo"):
        recipes.get("rgop")


def test_saturation_is_beyond_every_ratio_that_matters():
    assert math.exp(SAFE_LOG_RATIO) > 1e17
