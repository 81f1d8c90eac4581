"""Objectives that see a sequence, against their losses written out sequence by sequence."""

import math

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.diagnostics import effective_sample_size
from rgpo.core.loss import policy_loss
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.prefix import PrefixPPO
from rgpo.core.objectives.sequence_ratio import GMPO, GSPOToken
from rgpo.core.objectives.sequence_weights import VCPO, VESPO, MinPRO
from rgpo.core.units import unit_mean, unit_sum

B, T = 7, 6


def batch(spread: float, shared: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """(B, T) tokens with holes in the mask and one sequence of no token; A per row if shared."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, T, generator=generator, dtype=torch.float64)  # noqa: E731
    behavior, advantage = -draw().abs(), draw()
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, 1], mask[-1] = True, False
    return {
        "log_prob": behavior + spread * draw(),
        "behavior_log_prob": behavior,
        "advantage": advantage[:, :1].expand(B, T) if shared else advantage,
        "mask": mask,
        "segment_ids": torch.tensor([3, 3, 9, 9, 3, 1]).expand(B, T),
    }


def clip(r, a, low, high):
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def gate(r, k):
    return 1 + 2 / k * torch.tanh(k * (r - 1) / 2)


def turn_ratio(d, ids):
    """exp of the mean over the tokens of the same turn."""
    return torch.stack(
        [torch.stack([d[j] for j in range(len(d)) if ids[j] == i]).mean() for i in ids]
    ).exp()


def own(x, d):
    return x.detach() + d - d.detach()


def gspo_token(d, a, *_):
    return clip(torch.exp(own(d.mean(), d)), a, 3e-4, 4e-4)


def gmpo(d, a, *_):
    kept = [
        min(x, 0.4 + 0 * x) if s > 0 else max(x, -0.4 + 0 * x) for x, s in zip(d, a, strict=True)
    ]
    return torch.stack(kept).mean().exp() * a


def vespo(d, a, *_):
    ratio = d.sum().exp().detach()
    phi = torch.where(
        a > 0, ratio**2 * torch.exp(3 * (1 - ratio)), ratio**3 * torch.exp(2 * (1 - ratio))
    )
    return phi * a * d


def topr(d, a, *_):
    ratio = d.sum().exp().detach()
    return torch.where(a > 0, 1, ratio.clamp(0, 1)) * a * d


def vcpo(d, a, *_):
    return d.sum().exp().detach().clamp(max=8) * a * d


def minpro(d, a, *_):
    r = d.exp().detach()
    smallest = torch.stack([r[:t].min() if t else torch.ones_like(r[0]) for t in range(len(r))])
    return r.clamp(max=5) * smallest * a * d


def opsm(d, a, *_):
    keep = ~((a < 0) & (-d.detach().mean() > 0.5))
    return clip(d.exp(), a, 0.2, 0.2) * keep


def ctpo(d, a, *_):
    """As in the authors' code: clip and dual clip in log-space, both growing like sqrt(t)."""
    log_r = own(d.cumsum(0), d)
    root = torch.arange(1, len(d) + 1, dtype=d.dtype).sqrt()
    clipped = torch.clamp(log_r, -0.025 * root, 0.05 * root)
    loss = torch.maximum(-a * log_r.exp(), -a * clipped.exp())
    dual = torch.minimum(-a * torch.exp(0.05 * root), loss)
    return -torch.where(a < 0, dual, loss)


def prefix(d, a, *_):
    return clip(own(d.cumsum(0), d).exp(), a, 0.2, 0.2)


def prefix_mean(d, a, *_):
    count = torch.arange(1, len(d) + 1, dtype=d.dtype)
    return clip(own(d.cumsum(0) / count, d).exp(), a, 0.2, 0.2)


PER_TOKEN = {
    "gspo-token": gspo_token,
    "luspo": lambda d, a, *_: clip(d.mean().exp(), a, 2e-3, 2.5e-3),
    "gmpo": gmpo,
    "rgpo-sequence": lambda d, a, *_: gate(d.mean().exp(), 5000.0) * a,
    "vespo": vespo,
    "topr-sequence": topr,
    "vcpo": vcpo,
    "minpro-variant": minpro,
    "ppo-opsm": opsm,
    "ctpo": ctpo,
    "ppo-prefix-variant": prefix,
    "ppo-prefix-mean-variant": prefix_mean,
    "turn-ppo": lambda d, a, ids: clip(turn_ratio(d, ids), a, 0.2, 0.2),
    "s-ppo-variant": lambda d, a, *_: clip(d.exp(), a, 0.2, 0.2),
    "st-ppo-variant": lambda d, a, ids: clip(turn_ratio(d, ids), a, 0.2, 0.2),
}
"""The terms that a sequence's loss sums over tokens (token mean) or averages (sequence mean)."""

SEQUENCE_MEAN = {
    "gspo-token", "gmpo", "rgpo-sequence", "vcpo", "ppo-opsm", "turn-ppo", "s-ppo-variant",
    "st-ppo-variant",
}  # fmt: skip


def naive_loss(name: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    sums, total = [], 0.0
    for i in range(B):
        keep = data["mask"][i]
        if not keep.any():
            continue
        d = (data["log_prob"] - data["behavior_log_prob"])[i][keep]
        terms = PER_TOKEN[name](d, data["advantage"][i][keep], data["segment_ids"][i][keep])
        sums.append(terms.mean() if name in SEQUENCE_MEAN else terms.sum())
        total += len(d)
    return -torch.stack(sums).sum() / (B if name in SEQUENCE_MEAN else total)


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("spread", [3e-4, 0.05, 0.6])
@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradient_are_those_written_out(name, spread, shared):
    data = batch(spread, shared)
    data["log_prob"].requires_grad_()
    expected = naive_loss(name, data)
    found = policy_loss(name, **data).loss
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, data["log_prob"])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, data["log_prob"])[0])


def test_every_recipe_that_sees_a_sequence_is_written_out():
    known = {
        r.name for r in recipes.recipes()
        if r.objective.scope == "sequence" or r.level in ("turn", "sequence-sum")
    }  # fmt: skip
    assert known <= set(PER_TOKEN)


@pytest.mark.parametrize("name", ["gmpo", "ppo-opsm"])
def test_weight_is_a_finite_difference_of_the_sequence_objective(name):
    """The others stop the gradient through a part of it: they are written out above."""
    objective = recipes.get(name).objective
    generator = torch.Generator().manual_seed(3)
    d = 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True] * 6 + [False] * 2)
    for sign in (1.0, -1.0):
        a = torch.full_like(d, sign)
        for i in range(8):
            step = torch.zeros_like(d)
            step[i] = 1e-6
            up, down = (objective.value(d + h, a, mask=mask)[mask].sum() for h in (step, -step))
            expected = (up - down) / 2e-6 if mask[i] else torch.tensor(0.0)
            found = objective.weight(d, a, mask=mask)[i] if mask[i] else torch.tensor(0.0)
            torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6, check_dtype=False)


def test_gspo_token_is_gspo_when_the_tokens_share_an_advantage():
    for spread in (3e-4, 0.1):
        data = batch(spread, shared=True, seed=1)
        data["log_prob"].requires_grad_()
        losses = [policy_loss(name, **data).loss for name in ("gspo", "gspo-token")]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, data["log_prob"])[0] for loss in losses)
        )
    apart = batch(0.1, shared=False, seed=1)
    apart["log_prob"].requires_grad_()
    one, other = (
        torch.autograd.grad(policy_loss(name, **apart).loss, apart["log_prob"])[0]
        for name in ("gspo", "gspo-token")
    )
    assert not torch.allclose(one, other)


def test_gmpo_on_one_token_is_ppo_with_a_clip_in_log_space():
    d = torch.linspace(-2, 2, 81, dtype=torch.float64).unsqueeze(-1)
    same = PPO(clip_low=1 - math.exp(-0.4), clip_high=math.exp(0.4) - 1)
    for sign in (1.3, -0.7):
        a, mask = torch.full_like(d, sign), torch.ones_like(d, dtype=torch.bool)
        torch.testing.assert_close(GMPO().value(d, a, mask), same.value(d, a))
        torch.testing.assert_close(GMPO().weight(d, a, mask), same.weight(d, a))


def test_luspo_is_the_length_times_gspos_objective():
    """The paper's own average: over sequences, of the token sum."""
    data = batch(0.3, shared=True, seed=2)
    d = data["log_prob"] - data["behavior_log_prob"]
    length = data["mask"].sum(1)
    s = unit_mean(d, data["mask"]).squeeze(1).exp()
    expected = (length * clip(s, data["advantage"][:, 0], 2e-3, 2.5e-3)).mean()
    found = policy_loss("luspo", **data, reduction="sequence-sum", constant=1.0).loss
    torch.testing.assert_close(found, -expected)
    by_tokens = policy_loss("luspo", **data).loss
    torch.testing.assert_close(by_tokens, found * B / length.sum())


def test_three_tokens_of_gmpo_by_hand():
    """A > 0: d = (0.1, 0.7, -0.9) is clipped to (0.1, 0.4, -0.9), mean -2/15."""
    d = torch.tensor([0.1, 0.7, -0.9], dtype=torch.float64)
    a, mask = torch.full_like(d, 2.0), torch.ones(3, dtype=torch.bool)
    shared = 2 * math.exp(-2 / 15)
    assert GMPO().value(d, a, mask).tolist() == pytest.approx([shared] * 3)
    assert GMPO().weight(d, a, mask).tolist() == pytest.approx([shared, 0, shared])
    # A < 0: clipped to (0.1, 0.7, -0.4), mean 2/15
    shared = -math.exp(2 / 15)
    assert GMPO().weight(d, -a / 2, mask).tolist() == pytest.approx([shared, shared, 0])


def test_four_tokens_of_minpro_by_hand():
    """Ratios 2, 0.5, (masked), 3: nothing before, then 2, then min(2, 0.5)."""
    d = torch.tensor([2.0, 0.5, 0.01, 3.0], dtype=torch.float64).log()
    mask = torch.tensor([True, True, False, True])
    a = torch.ones_like(d)
    found = MinPRO().weight(d, a, mask)[mask]
    assert found.tolist() == pytest.approx([2, 0.5 * 2, 3 * 0.5])
    late = MinPRO().weight(d, a, torch.tensor([False, False, True, True]))
    assert late[2:].tolist() == pytest.approx([0.01, 3 * 0.01])


def test_two_tokens_of_ctpo_by_hand():
    """The second token's bounds are wider by the root of 2, and its ratio is the product."""
    d, mask = torch.tensor([0.04, 0.02], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    a = torch.ones_like(d)
    assert PrefixPPO().weight(d, a, mask).tolist() == pytest.approx(
        [math.exp(0.04), math.exp(0.06)]  # 0.06 < 0.05 sqrt 2 = 0.0707
    )
    assert PrefixPPO(growth=0.0).weight(d, a, mask).tolist() == pytest.approx([math.exp(0.04), 0])
    mean = PrefixPPO(growth=0.5, mean=True)  # mean 0.03 < 0.05 / sqrt 2 = 0.0354
    assert mean.weight(d, a, mask)[1].item() == pytest.approx(math.exp(0.03))
    assert mean.sup_weight == pytest.approx(math.exp(0.05))
    assert PrefixPPO().sup_weight == math.inf


def test_supremum_of_vespo_is_reached_by_long_sequences_too():
    """phi = 1.208 at W = 2/3 for A > 0 and 1.242 at W = 3/2 for A < 0."""
    mask = torch.ones(4, dtype=torch.bool)
    d = torch.full((4,), math.log(1.5) / 4, dtype=torch.float64)
    weight = VESPO().weight(d, -torch.ones_like(d), mask)
    assert weight.abs().max().item() == pytest.approx(VESPO().sup_weight)
    assert pytest.approx(1.2416, abs=1e-4) == VESPO().sup_weight


def test_vcpo_scales_the_learning_rate_by_the_effective_sample_size_of_sequences():
    assert VCPO().learning_rate_scale({"ess": 0.25}) == 0.5
    assert VCPO(base=0.5).learning_rate_scale({"ess": 0.6}) == 1.0
    assert VCPO().learning_rate_scale({"ess": 0.25, "sequence_ess": 0.81}) == pytest.approx(0.9)
    assert VCPO().learning_rate_scale({"ess": 0.25, "sequence_ess": math.nan}) == 1.0
    log_weight = torch.tensor([3.0, 1.0, 1.0, 1.0]).log()
    ess = effective_sample_size(log_weight)  # 6^2 / (4 * 12)
    assert ess.item() == pytest.approx(0.75)
    assert effective_sample_size(log_weight + 1000).item() == pytest.approx(0.75, rel=1e-4)


def test_units_of_no_element_are_empty_sums():
    x, none = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert unit_sum(x, none).tolist() == [[0], [0]]
    assert unit_mean(x, none).tolist() == [[0], [0]]


def test_hyper_parameters_beyond_their_range_are_refused():
    with pytest.raises(ValueError, match="growth must lie"):
        PrefixPPO(growth=1.5)
    with pytest.raises(ValueError, match="clip_low must be positive"):
        GSPOToken(clip_low=0.0)
