"""The composed loss, for every recipe: masks, micro-batches, missing inputs."""

import math

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.diagnostics import GLOSSARY, SEQUENCE_GLOSSARY
from rgpo.core.loss import policy_loss

B, T = 6, 5
ALL = [pytest.param(r, id=r.name) for r in recipes.recipes() if r.objective.scope != "group"]


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(B, T, generator=generator, dtype=dtype) * scale

    behavior = -draw().abs()
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, 0] = True
    return {
        "log_prob": behavior + draw(0.3),
        "behavior_log_prob": behavior,
        "reference_log_prob": behavior + draw(0.3),
        "proximal_log_prob": behavior + draw(0.3),
        "kl": draw(0.1).abs(),
        "median_advantage": draw(),
        "advantage": draw(),
        "mask": mask,
        "segment_ids": torch.arange(T).expand(B, T) // 2,
    }


def loss_and_gradient(recipe, data, **options):
    data = dict(data)
    log_prob = data.pop("log_prob").clone().requires_grad_()
    result = policy_loss(recipe, log_prob, **data, **options)
    (gradient,) = torch.autograd.grad(result.loss, log_prob)
    return result, gradient


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_elements_contribute_exactly_nothing(recipe, poison):
    clean = batch()
    dirty = {
        k: torch.where(clean["mask"], v, poison) if v.is_floating_point() else v
        for k, v in clean.items()
    }
    expected, expected_gradient = loss_and_gradient(recipe, clean)
    found, gradient = loss_and_gradient(recipe, dirty)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert torch.count_nonzero(gradient[~clean["mask"]]) == 0
    for name, number in found.diagnostics.items():
        assert torch.equal(number, expected.diagnostics[name]) or number.isnan()


@pytest.mark.parametrize("recipe", [p for p in ALL if p.values[0].objective.scope != "batch"])
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sequence-sum"])
def test_micro_batches_with_a_global_denominator_add_up(recipe, reduction):
    """Sequences split in two unequal parts, as by gradient accumulation or data parallelism.

    Objectives of scope "batch" see the part alone: their constants are those of the micro-batch.
    """
    data = batch(1)
    options = {"reduction": reduction, "constant": 7.0 if reduction == "sequence-sum" else None}
    whole, gradient = loss_and_gradient(recipe, data, **options)
    count = float(data["mask"].sum()) if reduction == "token-mean" else float(B)
    total, gradients = 0.0, []
    for part in (slice(0, 2), slice(2, B)):
        piece = {k: v[part] for k, v in data.items()}
        result, g = loss_and_gradient(recipe, piece, **options, denominator=count)
        total = total + result.loss
        gradients.append(g)
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.cat(gradients), gradient)


@pytest.mark.parametrize("recipe", ALL)
def test_one_extreme_token_leaves_everything_finite(recipe):
    """A log-ratio of 200, masked and unmasked: the case where other libraries return NaN."""
    for masked in (True, False):
        data = batch(2, torch.float32)
        data["log_prob"][0, 0] += 200
        data["mask"][0, 0] = not masked
        result, gradient = loss_and_gradient(recipe, data)
        assert torch.isfinite(result.loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("recipe", ALL)
def test_gradient_at_the_behaviour_policy_is_the_policy_gradient(recipe):
    """Ratio 1 everywhere: minus the mean of A, per token, for every unit-slope objective."""
    data = batch(3)
    for name in ("log_prob", "reference_log_prob", "proximal_log_prob"):
        data[name] = data["behavior_log_prob"].clone()
    data["mask"] = torch.ones(B, T, dtype=torch.bool)
    advantage = data["advantage"]
    if recipe.level != "token" or recipe.objective.scope == "sequence":
        # tokens that share a ratio push with their mean advantage: here one for the row
        advantage = advantage[:, :1].expand(B, T)
    data["median_advantage"], data["advantage"] = advantage, advantage
    _, gradient = loss_and_gradient(recipe, data, reduction="token-mean")
    if recipe.objective.unit_slope:
        torch.testing.assert_close(gradient, -advantage / (B * T))


def test_single_actions_need_no_mask_and_names_work():
    data = {k: v[:, 0] for k, v in batch(4).items()}
    by_name = policy_loss("sapo", data["log_prob"], data["behavior_log_prob"], data["advantage"])
    by_recipe = policy_loss(
        recipes.get("sapo"), data["log_prob"], data["behavior_log_prob"], data["advantage"]
    )
    assert torch.equal(by_name.loss, by_recipe.loss)
    assert set(by_name.diagnostics) <= set(GLOSSARY)


@pytest.mark.parametrize("name", ["vcpo", "ppo", "gspo"])
def test_the_effective_sample_size_of_sequences_is_that_of_their_exact_ratios(name):
    """Sequence ratios 3 1 1 1, whatever the recipe's own ratio: 6^2 / (4 * 12)."""
    behavior = torch.zeros(6, 4)
    log_prob = torch.zeros(6, 4)
    log_prob[0, :2] = math.log(3.0) / 2
    log_prob[1] = torch.tensor([2.0, -2.0, 0.0, math.nan])
    log_prob[5, 0] = math.inf  # not finite: left out, as by all metrics
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[1, 3], mask[4] = False, False
    found = policy_loss(name, log_prob, behavior, torch.ones(6, 4), mask).diagnostics
    assert found["sequence_ess"].item() == pytest.approx(0.75)
    assert set(found) == {*GLOSSARY, *SEQUENCE_GLOSSARY} - {"kl_spike_rate", "explained_variance"}
    actions = policy_loss("ppo", log_prob[:4, 0], behavior[:4, 0], torch.ones(4)).diagnostics
    assert "sequence_ess" not in actions


def test_a_missing_reference_is_refused_by_name():
    data = batch()
    data.pop("reference_log_prob")
    with pytest.raises(ValueError, match="needs reference_log_prob"):
        policy_loss("rgpo-dual-detached", **data)


def test_bfloat16_log_probs_are_computed_in_float32():
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(5).items()}
    assert policy_loss("rgpo", **data).loss.dtype == torch.float32
