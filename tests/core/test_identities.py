"""Identities between objectives: the same algorithm in other clothes must give the same numbers."""

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.objective import neutral_inputs
from rgpo.core.objectives.importance import Importance
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_dual import DualRGPO
from rgpo.core.objectives.rgpo_raw import RawRGPO
from rgpo.core.objectives.sapo import SAPO

D = torch.linspace(-4, 4, 401, dtype=torch.float64)
BOTH = [1.7, -0.9]


@pytest.mark.parametrize("a", BOTH)
def test_ppo_without_bounds_is_importance_sampling(a):
    advantage = torch.full_like(D, a)
    wide = PPO(clip_low=1e9, clip_high=1e9)
    torch.testing.assert_close(wide.value(D, advantage), Importance().value(D, advantage))
    torch.testing.assert_close(wide.weight(D, advantage), Importance().weight(D, advantage))


@pytest.mark.parametrize("a", BOTH)
@pytest.mark.parametrize("k", [1.0, 4.0, 10.0])
def test_normalised_rgpo_is_sapo_up_to_a_constant(a, k):
    advantage = torch.full_like(D, a)
    rgpo, sapo = RGPO(sharpness=k), SAPO(tau_positive=k, tau_negative=k)
    torch.testing.assert_close(rgpo.weight(D, advantage), sapo.weight(D, advantage))
    gap = sapo.value(D, advantage) - rgpo.value(D, advantage)
    torch.testing.assert_close(gap, torch.full_like(gap, (2 / k - 1) * a))


@pytest.mark.parametrize("k", [1.0, 4.0, 10.0])
def test_raw_rgpo_is_the_normalised_one_times_a_quarter_of_k(k):
    advantage = torch.ones_like(D)
    raw, normalised = RawRGPO(k).weight(D, advantage), RGPO(k).weight(D, advantage)
    torch.testing.assert_close(raw, k / 4 * normalised)


def test_all_unit_slope_objectives_agree_at_ratio_one():
    advantage = torch.tensor([[1.5], [-0.3]], dtype=torch.float64)
    zero = torch.zeros_like(advantage)
    for recipe in recipes.recipes():
        inputs = neutral_inputs(recipe.objective, zero, advantage)
        if recipe.objective.unit_slope:
            weight = recipe.objective.weight(zero, advantage, **inputs)
            torch.testing.assert_close(weight, advantage)


@pytest.mark.parametrize("a", BOTH)
def test_dual_forms_reduce_to_the_single_gate(a):
    """No share of the reference, or no distance from it, leaves the gate on the old policy."""
    advantage, single = torch.full_like(D, a), RGPO(sharpness=10.0)
    geometric = DualRGPO(form="geometric", mix=0.0)
    detached = DualRGPO(form="detached")
    expected = single.weight(D, advantage)
    torch.testing.assert_close(geometric.weight(D, advantage, D + 3), expected)
    torch.testing.assert_close(detached.weight(D, advantage, torch.zeros_like(D)), expected)


def test_product_form_stops_rejecting_far_from_the_reference_and_detached_does_not():
    """docs/theory.md section 7: at r_ref -> infinity the product is one gate."""
    advantage, far = torch.ones_like(D), torch.full_like(D, 8.0)
    product = DualRGPO(form="product", sharpness=4.0, reference_sharpness=4.0)
    torch.testing.assert_close(
        product.weight(D, advantage, far), 8 / 8 * RGPO(4.0).weight(D, advantage)
    )
    assert DualRGPO(form="detached").weight(D, advantage, far).abs().max() < 2e-3


def test_detached_bump_never_pushes_away_from_the_reference():
    """w / A >= 0 whatever the signs; differentiating the bump would make some of it negative."""
    reference = torch.linspace(-3, 3, 301, dtype=torch.float64)[:, None]
    for a in BOTH:
        advantage = torch.full_like(D, a)
        assert (DualRGPO(form="detached").weight(D, advantage, reference) * a >= 0).all()


@pytest.mark.parametrize("k", [1.0, 4.0, 10.0])
def test_value_gap_to_importance_sampling_is_bounded_as_derived(k):
    """docs/theory.md section 5: |r - g(r)| <= min(k^2 |r - 1|^3 / 12, |r - 1|)."""
    r = D.exp()
    gap = (r - RGPO(k).value(D, torch.ones_like(D))).abs()
    bound = torch.minimum(k**2 * (r - 1).abs() ** 3 / 12, (r - 1).abs())
    assert (gap <= bound + 1e-12).all()
