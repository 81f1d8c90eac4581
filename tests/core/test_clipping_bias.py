"""The clipping bias is what the unclipped gradient has and the clipped one has not."""

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.clipping_bias import clip_normalizer, clipped_loss, gradient_norm
from rgpo.core.loss import policy_loss
from rgpo.core.objectives.importance import Importance


def data(spread: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    behavior = -torch.rand(5, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return {
        "log_prob": (behavior + spread * noise).requires_grad_(),
        "behavior_log_prob": behavior,
        "advantage": torch.randn(5, 8, generator=generator, dtype=torch.float64),
        "mask": torch.rand(5, 8, generator=generator) < 0.8,
        "segment_ids": torch.arange(8).expand(5, 8) // 3,
    }


@pytest.mark.parametrize("name", ["s-ppo-variant", "st-ppo-variant"])
def test_bias_is_unclipped_minus_clipped_gradient(name):
    from dataclasses import replace

    batch, recipe = data(0.5), recipes.get(name)
    result = policy_loss(recipe, **batch)
    bias = clipped_loss(recipe, result, batch["advantage"], batch["mask"])
    unclipped = policy_loss(replace(recipe, objective=Importance()), **batch).loss
    found, clipped, whole = (
        torch.autograd.grad(loss, batch["log_prob"], retain_graph=True)[0]
        for loss in (bias, result.loss, unclipped)
    )
    torch.testing.assert_close(found, whole - clipped)
    assert torch.count_nonzero(found) > 0
    norm = gradient_norm(bias, [batch["log_prob"]])
    torch.testing.assert_close(norm, found.norm().float())


def test_nothing_clipped_leaves_a_constant_factor():
    batch, recipe = data(0.01), recipes.get("s-ppo-variant")
    result = policy_loss(recipe, **batch)
    norm = gradient_norm(
        clipped_loss(recipe, result, batch["advantage"], batch["mask"]), [batch["log_prob"]]
    )
    assert norm.item() == 0
    assert clip_normalizer(norm).item() == pytest.approx(10)


def test_the_scale_is_one_over_the_norm_above_the_floor():
    assert clip_normalizer(torch.tensor(4.0)).item() == 0.25
    assert clip_normalizer(torch.tensor(0.1), floor=0.01).item() == pytest.approx(10)
    with pytest.raises(ValueError, match="floor must be positive"):
        clip_normalizer(torch.tensor(1.0), floor=0.0)
