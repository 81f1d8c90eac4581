"""Identities and characteristic properties of the objectives that weigh elements and batches."""

import math

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.objectives.ano import ANO
from rgpo.core.objectives.awr import AWR
from rgpo.core.objectives.bapo import BAPO
from rgpo.core.objectives.biris import BIRIS
from rgpo.core.objectives.bpo import BPO
from rgpo.core.objectives.cispo import CISPO
from rgpo.core.objectives.dispo import DISPO
from rgpo.core.objectives.dppo import DPPO
from rgpo.core.objectives.dro import DRO
from rgpo.core.objectives.importance import Importance
from rgpo.core.objectives.m2po import M2PO
from rgpo.core.objectives.mhpo import MHPO
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.ppo_rollback import TRPPO, PPORollback, TrulyPPO
from rgpo.core.objectives.r2vpo import R2VPO, DualR2VPO
from rgpo.core.objectives.rec import REC
from rgpo.core.objectives.reinforce import Reinforce
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_raw import RawRGPO
from rgpo.core.objectives.rgpo_signed import SignedRGPO
from rgpo.core.objectives.sample_dropout import SampleDropout
from rgpo.core.objectives.spo import SPO
from rgpo.core.objectives.topr import TOPR
from rgpo.core.objectives.two_sided_mask import TwoSidedMask
from rgpo.core.objectives.vmpo import VMPO

D = torch.linspace(-4, 4, 401, dtype=torch.float64)
BOTH = [1.7, -0.9]


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def same_weight(one, other, advantage: torch.Tensor) -> None:
    torch.testing.assert_close(one.weight(D, advantage), other.weight(D, advantage))


# ---- sign-aware RGPO ------------------------------------------------------------------------


@pytest.mark.parametrize("a", BOTH)
def test_signed_gate_is_rgpo_outward_and_importance_sampling_inward(a):
    advantage, outward = torch.full_like(D, a), D * a > 0
    weight = SignedRGPO(cap=1e9).weight(D, advantage)
    torch.testing.assert_close(weight[outward], RGPO().weight(D, advantage)[outward])
    torch.testing.assert_close(weight[~outward], (D.exp() * a)[~outward])


@pytest.mark.parametrize("a", BOTH)
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_signed_weights_fade_outward_or_turn_against_the_advantage(a, pull):
    objective = SignedRGPO(pull=pull)
    far = torch.linspace(0.5, 1e4, 1000, dtype=torch.float64) * (1 if a > 0 else -1)
    outward = objective.weight(far, torch.full_like(far, a)) / a
    assert (outward <= 0.1).all()
    assert (outward >= -pull).all()
    assert float(outward[-1]) == pytest.approx(-pull, abs=1e-12)


def test_pull_back_is_stationary_where_the_smooth_clip_ends():
    """For k = 10 and c = 1 at r = 1.19, PPO's and SPO's 1.2; and the weight turns there."""
    d = torch.linspace(0, 2, 200_001, dtype=torch.float64)
    weight = SignedRGPO(pull=1.0).weight(d, torch.ones_like(d))
    (turn,) = torch.nonzero((weight[:-1] > 0) & (weight[1:] <= 0))
    assert float(d[turn].exp()) == pytest.approx(1.19, abs=0.01)


# ---- one algorithm in two sets of clothes ---------------------------------------------------


@pytest.mark.parametrize("a", BOTH)
def test_spo_is_r2vpo_with_a_multiplier_per_sample(a):
    same_weight(SPO(epsilon=0.2), R2VPO(multiplier=abs(a) / 0.4), torch.full_like(D, a))


@pytest.mark.parametrize("a", BOTH)
def test_kimis_opmd_is_dro_and_without_regulariser_reinforce(a):
    advantage = torch.full_like(D, a)
    kimi, dro = REC(regularizer="k2", coefficient=0.1), DRO(beta=0.2)
    same_weight(kimi, dro, advantage)
    torch.testing.assert_close(kimi.value(D, advantage), dro.value(D, advantage))
    same_weight(REC(), Reinforce(), advantage)


@pytest.mark.parametrize("a", BOTH)
def test_asymre_is_reinforce_with_a_lower_baseline(a):
    advantage = torch.full_like(D, a)
    shifted = Reinforce().weight(D, advantage + 0.1)
    asymre = REC(regularizer="forward-kl", coefficient=0.1)
    torch.testing.assert_close(asymre.weight(D, advantage), shifted)


@pytest.mark.parametrize("a", BOTH)
def test_the_masks_of_rec_are_those_of_ppo_and_of_the_two_sided_mask(a):
    advantage = torch.full_like(D, a)
    same_weight(REC(mask="one-side", weighting="is"), PPO(), advantage)
    two_sided = TwoSidedMask(clip_low=0.2, clip_high=0.2)
    same_weight(REC(mask="two-side", weighting="is"), two_sided, advantage)
    ring, inside = REC(mask="ring", weighting="is"), (math.log(0.8) < D) & (math.log(1.2) > D)
    torch.testing.assert_close(
        ring.weight(D, advantage)[inside], Importance().weight(D, advantage)[inside]
    )


@pytest.mark.parametrize("a", BOTH)
def test_the_two_sided_mask_is_ppo_without_its_restoring_side(a):
    advantage = torch.full_like(D, a)
    mask = TwoSidedMask(clip_low=0.2, clip_high=0.2).weight(D, advantage)
    ppo, outside = PPO().weight(D, advantage), (D - math.log(0.8)) * (D - math.log(1.2)) > 0
    torch.testing.assert_close(mask[~outside], ppo[~outside])
    assert (mask[outside] == 0).all()
    assert (ppo[outside & (D * a < 0)] != 0).all()


@pytest.mark.parametrize("a", BOTH)
def test_p3o_scopic_is_sapo_and_both_readings_of_rgpo_at_k_4(a):
    advantage, p3o = torch.full_like(D, a), recipes.get("p3o-scopic").objective
    same_weight(p3o, RGPO(sharpness=4.0), advantage)
    torch.testing.assert_close(p3o.value(D, advantage), RawRGPO(4.0).value(D, advantage))


@pytest.mark.parametrize("a", BOTH)
def test_dispo_with_equal_bounds_is_cispo(a):
    same_weight(DISPO(0.0, 5.0, 0.0, 5.0), CISPO(0.0, 5.0), torch.full_like(D, a))


def test_topr_is_reinforce_for_good_and_truncated_importance_sampling_for_bad_samples():
    good, bad = torch.full_like(D, 1.7), torch.full_like(D, -0.9)
    same_weight(TOPR(), Reinforce(), good)
    same_weight(TOPR(), CISPO(0.0, 1.0), bad)


@pytest.mark.parametrize("a", BOTH)
def test_rollback_without_slope_is_ppo(a):
    same_weight(PPORollback(rollback=1e-12), PPO(), torch.full_like(D, a))


@pytest.mark.parametrize("a", BOTH)
def test_trust_region_tests_act_outward_and_outside_only(a):
    """Inside, or on the way back, importance sampling; else nothing, or k3's slope."""
    advantage, far, outward = torch.full_like(D, a), torch.ones_like(D), D * a > 0
    plain, shift = Importance().weight(D, advantage), D.exp() - 1
    for objective, left in (
        (TRPPO(), 0 * shift),
        (TrulyPPO(), plain - 5 * shift),
        (TrulyPPO(likelihood=0.0, penalty=0.4), -0.4 * shift),
    ):
        torch.testing.assert_close(objective.weight(D, advantage, 0 * far), plain)
        weight = objective.weight(D, advantage, far)
        torch.testing.assert_close(weight, torch.where(outward, left, plain))


@pytest.mark.parametrize("a", BOTH)
def test_biris_lowers_the_advantage_on_the_right_and_raises_it_on_the_left(a):
    shifted = a - 0.1 * torch.sign(D.round(decimals=9))
    weight = BIRIS(alpha=0.1).weight(D, torch.full_like(D, a))
    torch.testing.assert_close(weight, Importance().weight(D, shifted))


def test_bpo_pulls_to_the_old_policy_at_the_median_and_with_full_force_everywhere():
    advantage, zero = torch.full_like(D, -2.0), torch.zeros_like(D)
    weight = BPO().weight(D, advantage, zero)
    torch.testing.assert_close(weight, -torch.sign(D) * 2 * D.exp())
    target = BPO(low=0.2, high=0.4)._target(double(-1.0, 0.0, 1.0))
    torch.testing.assert_close(target, double(0.8, 1.1, 1.4))


def test_vmpo_of_a_whole_batch_is_awr_normalised_to_mean_one():
    advantage = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)
    weight = VMPO(fraction=1.0).weight(advantage, advantage, advantage < 9)
    regression = AWR(cap=1e9).weight(advantage, advantage)
    torch.testing.assert_close(weight, regression / regression.mean())


# ---- shapes ---------------------------------------------------------------------------------


def test_mhpo_as_published_scales_the_step_down():
    """Slope 0.265 at r = 1 and at most 0.396, at r = 1.78; normalised it is the same shape."""
    one, raw, normal = torch.ones_like(D), MHPO(), MHPO(normalize=True)
    slope = float(raw.weight(double(0.0), double(1.0)))
    assert slope == pytest.approx(0.265, abs=5e-4)
    assert raw.sup_weight == pytest.approx(0.396, abs=5e-4)
    assert float(raw.weight(double(1.78).log(), double(1.0))) == pytest.approx(raw.sup_weight, 1e-4)
    torch.testing.assert_close(normal.weight(D, one), raw.weight(D, one) / slope)
    assert normal.sup_weight == pytest.approx(raw.sup_weight / slope)


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3])
def test_ano_has_the_shape_that_its_constants_are_solved_for(epsilon):
    ano = ANO(epsilon=epsilon)
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    slope = ano._slope(x)
    assert float(ano._slope(double(1.0))) == pytest.approx(1)
    assert float(ano.value(double(0.0), double(1.0))) == pytest.approx(1)
    assert float(ano._slope(double(1 + epsilon))) == pytest.approx(0, abs=1e-12)
    assert float(slope.min()) == pytest.approx(-1.5, abs=1e-6)
    assert float(x[slope.argmin()]) == pytest.approx(1 + 4.62 * epsilon, rel=2e-3)
    assert abs(float(slope[-1])) < 1e-6
    assert float(slope[0]) == pytest.approx(10, rel=1e-6)


def test_ano_weighs_lagging_samples_up_and_mirrors_the_sign():
    """The sheet's numbers at eps = 0.2: G'(0.8) = 2.16, G'(0) = 6.6."""
    found = ANO()._slope(double(0.8, 0.0))
    torch.testing.assert_close(found, double(2.16, 6.6), rtol=5e-3, atol=0)
    r = torch.linspace(0.1, 1.9, 19, dtype=torch.float64)
    good = ANO().weight(r.log(), torch.ones_like(r)) / r
    bad = ANO().weight(r.log(), -torch.ones_like(r)) / r
    torch.testing.assert_close(bad, -good.flip(0))


@pytest.mark.parametrize(("divergence", "delta"), [("tv", 0.15), ("kl", 0.05)])
def test_dppo_masks_by_probability_where_ppo_masks_by_ratio(divergence, delta):
    objective = DPPO(divergence=divergence, delta_low=delta, delta_high=delta)

    def keeps(p: float, ratio: float, a: float) -> bool:
        d = double(ratio).log()
        return bool(objective.weight(d, double(a), double(p).log()) != 0)

    assert keeps(1e-4, 10.0, 1.0)  # PPO masks it: the ratio is far beyond 1.2
    assert not keeps(0.99, 1.19, 1.0) or divergence == "tv"  # PPO keeps it
    assert not keeps(0.9, 2.0, 1.0)
    assert not keeps(0.1, 0.2, -1.0)
    assert keeps(0.9, 2.0, -1.0)  # on the way back
    assert keeps(0.1, 0.2, 1.0)


def test_dppo_threshold_is_the_bernoulli_divergence():
    p, q = 0.45, 0.3
    kl = sum(
        x * math.log(x / y) for x, y in ((q, p), (1 - q, 1 - p))
    )  # of the old probability from the new one
    d, one, log_p = double(p / q).log(), double(1.0), double(p).log()
    for divergence, distance in (("tv", p - q), ("kl", kl)):
        for delta, kept in ((distance * 1.001, True), (distance * 0.999, False)):
            objective = DPPO(divergence=divergence, delta_high=delta)
            assert bool(objective.weight(d, one, log_p) != 0) == kept


# ---- adaptive -------------------------------------------------------------------------------


def test_dual_multiplier_climbs_while_the_variance_is_too_large_and_falls_to_zero():
    objective = DualR2VPO(multiplier=0.5, delta=0.02, rate=10.0)
    assert objective.adapt({"chi2": 0.03}).multiplier == pytest.approx(0.6)
    assert objective.adapt({"chi2": 0.0}).multiplier == pytest.approx(0.3)
    assert objective.adapt({"chi2": 0.0}).adapt({"chi2": 0.0}).adapt({"chi2": 0.0}).multiplier == 0
    assert objective.adapt({"chi2": 1e30}).multiplier == pytest.approx(0.7)
    assert objective.adapt({"chi2": math.nan}) == objective
    assert type(objective.adapt({"chi2": 0.03})) is DualR2VPO


def test_vmpo_by_hand_and_with_ties():
    """Upper half {2, 1} of four: softmax (e, 1) / (e + 1), times 4."""
    zero, every = torch.zeros(4, dtype=torch.float64), torch.tensor([True] * 4)
    weight = VMPO().weight(zero, double(2, 1, 0, -1), every)
    upper = 4 * math.e / (math.e + 1)
    torch.testing.assert_close(weight, double(upper, 4 - upper, 0, 0))
    weight = VMPO().weight(zero, double(2, 1, 0, -1), torch.tensor([False, True, True, True]))
    torch.testing.assert_close(weight, double(0, 3 * math.e / (math.e + 1), 3 / (math.e + 1), 0))
    tied = VMPO().weight(zero, double(1, 1, 1, -1), every)
    torch.testing.assert_close(tied, double(4 / 3, 4 / 3, 4 / 3, 0))
    none = VMPO().weight(zero, double(2, 1, 0, -1), ~every)
    assert (none == 0).all()


def test_sample_dropout_by_hand():
    """Two of three within a ratio of 2, so that each counts 3/2; none within: plain PPO."""
    ratio, one, every = double(1.0, 1.1, 3.0), double(1, 1, -1), torch.tensor([True] * 3)
    weight = SampleDropout().weight(ratio.log(), one, every)
    torch.testing.assert_close(weight, double(1.5, 1.65, 0))
    far = (ratio + 2).log()
    torch.testing.assert_close(SampleDropout().weight(far, one, every), PPO().weight(far, one))
    some = SampleDropout().weight(ratio.log(), one, torch.tensor([True, False, True]))
    assert float(some[0]) == pytest.approx(2.0)


def test_m2po_by_hand():
    """Outward d: 0.1, 0.2, 0.6; budget 3 * 0.04 = 0.01 + 0.04 + tau^2, so tau^2 = 0.07."""
    objective, every = M2PO(floor_low=0.0, floor_high=0.0), torch.tensor([True] * 4)
    d, a = double(0.1, -0.2, 0.6, -1.0), double(1, -1, 1, 1)
    low, high = objective.bounds(d, a, every)
    assert float(high) == pytest.approx(math.exp(math.sqrt(0.07)))
    assert float(low) == pytest.approx(math.exp(-math.sqrt(0.07)))
    weight = objective.weight(d, a, every)
    torch.testing.assert_close(weight, d.exp() * a * double(1, 1, 0, 1))
    low, high = M2PO().bounds(d, a, every)
    assert (float(low), float(high)) == (pytest.approx(0.7), 1.5)
    low, high = objective.bounds(d, a, torch.tensor([True, True, False, True]))
    assert (float(low), float(high)) == (0.0, math.inf)


def test_m2po_spends_its_budget_exactly():
    generator = torch.Generator().manual_seed(0)
    d, a = torch.randn(2, 50, 64, generator=generator, dtype=torch.float64)
    objective, every = M2PO(floor_low=0.0, floor_high=0.0), torch.ones(50, 64, dtype=torch.bool)
    low, high = objective.bounds(d, a, every)
    outward, tau = d * a > 0, high.log()
    spent = (torch.minimum(d**2, tau**2) * outward).sum(-1) / outward.sum(-1)
    torch.testing.assert_close(spent, torch.full_like(spent, 0.04))
    torch.testing.assert_close(low, 1 / high)


def authors_search(ratio, advantage, b: BAPO) -> tuple[float, float]:
    """The loop of the authors' code, one candidate after the other, with either count."""

    def met(low, high):
        positive, negative = advantage > 0, advantage < 0
        if b.count == "published":
            p = (ratio.clamp(max=high) * advantage)[positive].sum()
            n = -(ratio.clamp(min=low) * advantage)[negative].sum()
        else:
            p = (ratio * advantage)[positive & (ratio <= high)].sum()
            n = -(ratio * advantage)[negative & (ratio >= low) & (ratio <= b.dual_clip)].sum()
        return p > 0 and p * (1 - b.share) >= b.share * n

    low, high = b.low, b.high
    while not met(low, high) and low < b.low_max - 1e-9:
        low = low + b.step
    while not met(low, high) and high < b.high_max - 1e-9:
        high = high + b.step
    return low, high


@pytest.mark.parametrize("name", ["bapo", "bapo-published"])
def test_bapo_finds_the_bounds_of_the_sequential_search(name):
    objective = recipes.get(name).objective
    generator = torch.Generator().manual_seed(1)
    d, a = torch.randn(2, 40, 128, generator=generator, dtype=torch.float64)
    d, a = 0.6 * d, a + torch.linspace(-0.6, 0.2, 40).unsqueeze(-1)
    low, high = objective.bounds(d, a, torch.ones_like(d, dtype=torch.bool))
    expected = [authors_search(r, x, objective) for r, x in zip(d.exp(), a, strict=True)]
    torch.testing.assert_close(torch.cat([low, high], -1), double(*sum(expected, ())).view(-1, 2))
    assert len(high.unique()) > 3


def test_raising_bapos_lower_bound_moves_the_published_criterion_the_wrong_way():
    """The share of positives falls by what is counted, and rises by what exerts force."""
    generator = torch.Generator().manual_seed(0)
    d = 0.35 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    a = torch.where(torch.rand(20_000, generator=generator) < 0.35, 1.0, -1.0).double()
    every, lows, highs = torch.ones_like(d, dtype=torch.bool), double(0.6, 0.9), double(1.2)
    for count, rises in (("published", False), ("unclipped", True)):
        p, n = BAPO(count=count)._contributions(d, a, every, lows, highs)
        assert bool(p / n[1] > p / n[0]) == rises


def test_mdpo_penalises_the_reverse_kl_more_and_more():
    kl = recipes.get("mdpo").kl
    assert kl.direction == "reverse"
    assert [kl.weight(p) for p in (0.0, 0.5, 0.9)] == pytest.approx([1, 2, 10])


# ---- refusals -------------------------------------------------------------------------------


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="contradicts coefficient"):
        REC(regularizer="k2")
    with pytest.raises(ValueError, match="unknown mask 'ring-side'"):
        REC(mask="ring-side")
    with pytest.raises(ValueError, match="unknown divergence 'js'"):
        DPPO(divergence="js")
    with pytest.raises(ValueError, match="unknown count"):
        BAPO(count="all")
    with pytest.raises(ValueError, match="must be below lag"):
        ANO(lag=1.0, pull=2.0)
