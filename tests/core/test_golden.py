"""Golden values worked by hand, one table row per case; every recipe must have rows.

Notation: (recipe, r, A, given) -> (value, weight), where `given` is a second ratio, or further
inputs by name, or None: those that say nothing. s is the logistic sigmoid.
"""

import math

import golden_catalogue
import golden_reparam
import golden_units
import pytest
import torch

from rgpo.core import recipes
from rgpo.core.gates import Gate
from rgpo.core.objective import neutral_inputs

INF = float("inf")
SECH2_5 = 1.8158323094e-4  # 4 / (e^5 + e^-5)^2 = 4 / 148.4199^2
S105 = 1 / (1 + math.exp(-1.05))
TRUST = math.exp(-2 * math.log(2) ** 2)
GOLDEN = [
    # log r and 1: the ratio plays no part in the weight
    ("reinforce", 2.0, 1.0, None, math.log(2), 1.0),
    ("reinforce", 0.5, -3.0, None, 3 * math.log(2), -3.0),
    # r A
    ("importance", 2.0, 1.0, None, 2.0, 2.0),
    ("importance", 0.5, -3.0, None, -1.5, -1.5),
    ("trpo", 2.0, -1.0, None, -2.0, -2.0),
    ("ppo-kl", 0.5, 2.0, None, 1.0, 1.0),
    # clip at 0.8 and 1.2: flat only on the side that A pushes to
    ("ppo", 2.0, 1.0, None, 1.2, 0.0),
    ("ppo", 0.5, 1.0, None, 0.5, 0.5),
    ("ppo", 2.0, -1.0, None, -2.0, -2.0),
    ("ppo", 0.5, -1.0, None, -0.8, 0.0),
    # max(J, 3 A) for A < 0
    ("ppo-dual-clip", 4.0, -1.0, None, -3.0, 0.0),
    ("ppo-dual-clip", 2.0, -1.0, None, -2.0, -2.0),
    ("ppo-dual-clip", 4.0, 1.0, None, 1.2, 0.0),
    ("dapo", 1.25, 1.0, None, 1.25, 1.25),
    ("dapo", 1.30, 1.0, None, 1.28, 0.0),
    ("dapo", 0.79, -1.0, None, -0.8, 0.0),
    ("gspo", 1.0005, 1.0, None, 1.0004, 0.0),
    ("gspo", 0.9996, -1.0, None, -0.9997, 0.0),
    ("gspo", 1.0003, 1.0, None, 1.0003, 1.0003),
    # k = 10, r = 2: z = 5, tanh 5 = 0.9999092; r = 1/2: z = -2.5, tanh 2.5 = 0.9866143
    ("rgpo-gate", 2.0, 1.0, None, 1 + 0.2 * 0.99990920426, 2 * SECH2_5),
    ("rgpo-gate", 0.5, -1.0, None, -(1 - 0.2 * 0.98661429815), -0.5 * (1 - 0.98661429815**2)),
    ("rgpo", 2.0, 1.0, None, 1 + 0.2 * 0.99990920426, 2 * SECH2_5),
    # b = 5, r = 1.2: z = 1, erf 1 = 0.84270079; r = 0.8: z = -1
    ("rgpo-erf", 1.2, 1.0, None, 1 + 0.88622692545 * 0.84270079295 / 5, 1.2 / math.e),
    ("rgpo-erf", 0.8, -1.0, None, -(1 - 0.88622692545 * 0.84270079295 / 5), -0.8 / math.e),
    # arctan 1 = pi/4, 1 + 1 = 2
    ("rgpo-arctan", 1.2, 1.0, None, 1 + math.pi / 20, 0.6),
    ("rgpo-arctan", 0.8, -1.0, None, -(1 - math.pi / 20), -0.4),
    # 1 / (1 + 1) = 1/2, squared 1/4
    ("rgpo-softsign", 1.2, 1.0, None, 1.1, 0.3),
    ("rgpo-softsign", 0.8, -1.0, None, -0.9, -0.2),
    # k = 4: s(4) = 0.98201379, s(-2) = 0.11920292; w = k r s (1 - s)
    ("rgpo-raw", 2.0, 1.0, None, 0.98201379004, 8 * 0.98201379004 * 0.01798620996),
    ("rgpo-raw", 0.5, -1.0, None, -0.11920292202, -2 * 0.11920292202 * 0.88079707798),
    # k = 10: tanh(5 ln 2) = (2^10 - 1)/(2^10 + 1); sech^2 = 4 * 2^10 / 1025^2
    ("rgpo-log", 2.0, 1.0, None, 1 + 0.2 * 1023 / 1025, 4096 / 1025**2),
    ("rgpo-log", 0.5, -1.0, None, -(1 - 0.2 * 1023 / 1025), -4096 / 1025**2),
    # tau = 1: 4 s(1), s(1) = 0.73105858; tau = 1.05: s(1.05) = 0.74077490
    ("sapo", 2.0, 1.0, None, 4 * 0.73105857863, 8 * 0.73105857863 * 0.26894142137),
    ("sapo", 2.0, -1.0, None, -4 / 1.05 * S105, -8 * S105 * (1 - S105)),
    # exp(-(ln 2 / 0.5)^2 / 2) = exp(-2 ln^2 2) = 0.38254613
    ("gipo", 2.0, 1.0, None, 2 * TRUST, 2 * TRUST),
    ("gipo", 0.5, -1.0, None, -0.5 * TRUST, -0.5 * TRUST),
    # clip(r, 0, 5)
    ("cispo", 8.0, 1.0, None, 5 * math.log(8), 5.0),
    ("cispo", 0.5, -2.0, None, math.log(2), -1.0),
    # r A - |A| (r - 1)^2 / 0.4; r (A - 5 |A| (r - 1))
    ("spo", 2.0, 1.0, None, 2 - 2.5, -8.0),
    ("spo", 2.0, -1.0, None, -2 - 2.5, -12.0),
    ("spo", 0.5, 1.0, None, 0.5 - 0.625, 1.75),
    # c = 8/11; r = 1: s(0) = 1/2; r_ref = 2: s(1) = 0.73105858, gate weight 1.57289545
    (
        "rgpo-dual-product",
        1.0,
        1.0,
        2.0,
        1 + 8 / 11 * (0.5 * 0.73105857863 - 0.25),
        8 / 11 * (2.5 * 0.73105857863 + 0.25 * 1.57289546593 * 0.5),
    ),
    ("rgpo-dual-product", 1.0, -1.0, 1.0, -1.0, -1.0),
    # tanh(ln 2 / 2) = 1/3, so the bump at r_ref = 2 is 8/9
    ("rgpo-dual-detached", 1.0, 1.0, 2.0, 8 / 9, 8 / 9),
    ("rgpo-dual-detached", 2.0, -1.0, 0.5, -8 / 9 * 1.199981840852, -16 / 9 * SECH2_5),
    # mix 0.2: r^0.8 r_ref^0.2 = 2 at r = 1, r_ref = 32
    ("rgpo-dual-geometric", 1.0, 1.0, 32.0, 1 + 0.2 * 0.99990920426, 2 * SECH2_5),
    ("rgpo-dual-geometric", 2.0, -1.0, 2.0, -(1 + 0.2 * 0.99990920426), -2 * SECH2_5),
]
LIMITS = {  # w / A as r -> 0 and r -> infinity, for A > 0 then A < 0
    "reinforce": (1, 1, 1, 1),
    "importance": (0, INF, 0, INF),
    "trpo": (0, INF, 0, INF),
    "ppo-kl": (0, INF, 0, INF),
    "ppo": (0, 0, 0, INF),
    "ppo-dual-clip": (0, 0, 0, 0),
    "dapo": (0, 0, 0, INF),
    "grpo": (0, 0, 0, INF),
    "gspo": (0, 0, 0, INF),
    "cispo": (0, 5, 0, 5),
    "spo": (0, -INF, 0, INF),
}
for more in (golden_catalogue, golden_reparam, golden_units):
    GOLDEN += more.GOLDEN
    LIMITS |= more.LIMITS


def inputs_of(recipe: recipes.Recipe, d: torch.Tensor, a: torch.Tensor, given) -> dict:
    """Neutral inputs, but for a second ratio (a number) or inputs by name (a dictionary)."""
    inputs = neutral_inputs(recipe.objective, d, a)
    if isinstance(given, float):
        ratios = [name for name in inputs if name.endswith("log_ratio")]
        given = dict.fromkeys(ratios, math.log(given))
    for name, number in (given or {}).items():
        inputs[name] = torch.full_like(d, number)
    return inputs


@pytest.mark.parametrize(("name", "ratio", "a", "given", "value", "weight"), GOLDEN)
def test_golden_values(name, ratio, a, given, value, weight):
    recipe = recipes.get(name)
    d = torch.tensor([math.log(ratio)], dtype=torch.float64)
    advantage = torch.tensor([a], dtype=torch.float64)
    inputs = inputs_of(recipe, d, advantage, given)
    found = recipe.objective.value(d, advantage, **inputs)
    assert float(found) == pytest.approx(value, rel=1e-8)
    found = recipe.objective.weight(d, advantage, **inputs)
    assert float(found) == pytest.approx(weight, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_golden_rows_for_both_signs(name):
    signs = {row[2] > 0 for row in GOLDEN if row[0] == name}
    families = {"trpo", "ppo-kl", "rgpo", "grpo"}  # the same object as importance and rgpo-gate
    assert signs == {True, False} or name in families


@pytest.mark.parametrize("name", recipes.names())
def test_limits_at_zero_and_infinity(name):
    """All gates that are not in LIMITS lose every sample at both ends."""
    objective = recipes.get(name).objective
    expected = LIMITS.get(name, (0, 0, 0, 0))
    found = []
    for sign in (1.0, -1.0):
        for end in (-30.0, 30.0):
            d, a = (torch.tensor([x], dtype=torch.float64) for x in (end, sign))
            inputs = neutral_inputs(objective, d, a)
            if "reference_log_ratio" in inputs:
                inputs["reference_log_ratio"] = d
            found.append(float(objective.weight(d, a, **inputs)) * sign)
    for number, limit in zip(found, expected, strict=True):
        if math.isinf(limit):
            assert number * limit > 0
            assert abs(number) > 1e9
        else:
            assert number == pytest.approx(limit, abs=1e-9)


@pytest.mark.parametrize(
    ("k", "supremum"), [(1, 1.5747), (2, 1.1985), (4, 1.0580), (10, 1.0099), (20, 1.0025)]
)
def test_sigmoid_supremum_is_that_of_the_theory(k, supremum):
    """The table of docs/theory.md section 4."""
    assert Gate(k).sup_weight == pytest.approx(supremum, abs=5e-5)
