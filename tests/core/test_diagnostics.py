"""Every metric against its definition; extremes; masks; many runs in one call."""

import math

import numpy as np
import pytest
import torch

from rgpo.core import recipes
from rgpo.core.diagnostics import (
    GLOSSARY,
    NO_SPREAD,
    QUANTILES,
    explained_variance,
    has_spread,
    kl_spike_rate,
    ratio_diagnostics,
)

NAN, INF = float("nan"), float("inf")
close = torch.testing.assert_close


def batch(seed: int = 0, shape: tuple[int, ...] = (2048,), scale: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    d, advantage = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return d * scale, advantage, torch.rand(shape, generator=generator) < 0.7


def test_the_glossary_explains_exactly_what_is_emitted():
    d, advantage, _ = batch()
    emitted = ratio_diagnostics(d, advantage, advantage).keys()
    assert set(GLOSSARY) == set(emitted) | {"kl_spike_rate", "explained_variance"}
    for sentence in GLOSSARY.values():
        assert sentence.endswith(".")
        assert len(sentence) > 15


def test_by_hand():
    """Ratios 1/2 1 2 2, advantages 1 -1 2 0, weights 1/2 0 -1 3.

    k1 = -log(1/2 * 1 * 2 * 2) / 4 = -log 2 / 4;  k3 = (5.5 - 4 - log 2) / 4
    ess = 5.5^2 / (4 * 9.25); the fourth sample has A = 0 and no part in what follows:
    clipped: one of three; acceptance: 1, 0 and 0 (against); mean |w|/|A|: (1/2 + 0 + 1/2) / 3
    """
    ratio = torch.tensor([0.5, 1, 2, 2], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1, 2, 0], dtype=torch.float64)
    weight = torch.tensor([0.5, 0, -1, 3], dtype=torch.float64)
    found = {k: float(v) for k, v in ratio_diagnostics(ratio.log(), advantage, weight).items()}
    expected = {
        "kl_k1": -math.log(2) / 4,
        "kl_k3": (1.5 - math.log(2)) / 4,
        "ess": 30.25 / 37,
        "chi2": (0.25 + 0 + 1 + 1) / 4,
        "ratio_min": 0.5,
        "ratio_q001": 0.5,
        "ratio_q01": 0.5,
        "ratio_q50": 1,
        "ratio_q99": 2,
        "ratio_q999": 2,
        "ratio_max": 2,
        "ratio_spread": math.log(2),
        "tail_index": NAN,  # no 10 exceedances among 4
        "active_clip_fraction": 1 / 3,
        "gate_acceptance": 1 / 3,
        "pull_back_fraction": 1 / 3,
        "weight_mean": 1 / 3,
        "nonfinite": 0,
    }
    assert found == {k: pytest.approx(v, nan_ok=True) for k, v in expected.items()}


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 999, 1000, 1001, 2048])
def test_quantiles_are_samples_of_the_inverted_distribution_function(n):
    d, advantage, _ = batch(n, (n,))
    found = ratio_diagnostics(d, advantage, advantage)
    for key, per_mille in QUANTILES.items():
        expected = np.quantile(d.exp().numpy(), per_mille / 1000, method="inverted_cdf")
        assert float(found[key]) == pytest.approx(expected, rel=1e-12), key


def test_tail_index_recovers_the_exponent_of_a_pareto_tail():
    """P(r > t) = t^-alpha: log r is exponential of mean 1 / alpha; standard error alpha/sqrt(k)."""
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (1.2, 2.0, 5.0):
        d = -torch.log(uniform) / alpha
        found = float(ratio_diagnostics(d, d, d)["tail_index"])
        assert found == pytest.approx(alpha, rel=3 / math.sqrt(2000))


def test_tail_index_by_hand():
    """n = 12: k = 10, threshold the second smallest (0); excesses 1 2 ... 10, sum 55."""
    d = torch.tensor([5.0, 1, 2, -3, 3, 4, 6, 0, 7, 8, 9, 10], dtype=torch.float64)
    assert float(ratio_diagnostics(d, d, d)["tail_index"]) == pytest.approx(10 / 55)
    assert float(ratio_diagnostics(d[:11], d[:11], d[:11])["tail_index"]) > 0
    assert math.isnan(float(ratio_diagnostics(d[:10], d[:10], d[:10])["tail_index"]))


def test_a_ratio_of_one_everywhere():
    d, advantage, _ = batch()
    found = ratio_diagnostics(d * 0, advantage, advantage)
    assert {k for k, v in found.items() if float(v) == 1} == {
        "ess",
        "gate_acceptance",
        "weight_mean",
        *QUANTILES,
    }
    assert {k for k, v in found.items() if float(v) == 0} == {
        "kl_k1",
        "kl_k3",
        "chi2",
        "ratio_spread",
        "active_clip_fraction",
        "pull_back_fraction",
        "nonfinite",
    }
    assert float(found["tail_index"]) == INF
    assert not has_spread(found["ratio_spread"])
    assert has_spread(ratio_diagnostics(d, advantage, advantage)["ratio_spread"])
    assert "inert" in NO_SPREAD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 3.0, 50.0, 5e3])
def test_ess_is_in_0_1_and_right(scale, dtype):
    """miles #3230: a reported ESS above 1."""
    d, advantage, _ = batch(1, (40, 64), scale)
    d, advantage = d.to(dtype), advantage.to(dtype)
    ess = ratio_diagnostics(d, advantage, advantage)["ess"]
    assert ((ess >= 1 / 64 - 1e-6) & (ess <= 1)).all()
    exact = 2 * torch.logsumexp(d.double(), -1) - torch.logsumexp(2 * d.double(), -1)
    close(ess.double(), exact.exp() / 64, rtol=1e-4, atol=0)


def test_for_ppo_the_active_clip_fraction_is_the_active_clip():
    d, advantage, _ = batch(2)
    ratio = d.exp()
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    found = ratio_diagnostics(d, advantage, recipes.get("ppo").objective.weight(d, advantage))
    share = clipped.double().mean()
    assert 0.1 < float(share) < 0.4
    close(found["active_clip_fraction"], share)
    close(found["gate_acceptance"], 1 - share)  # the rest keeps the whole gradient
    assert float(found["pull_back_fraction"]) == 0


def test_gate_acceptance_of_rgpo_is_the_mean_slope_of_its_gate():
    d, advantage, _ = batch(3)
    found = ratio_diagnostics(d, advantage, recipes.get("rgpo-gate").objective.weight(d, advantage))
    slope = 1 / torch.cosh(5 * (d.exp() - 1)) ** 2
    close(found["gate_acceptance"], slope.mean())
    close(found["weight_mean"], (d.exp() * slope).mean())


def test_pull_back_fraction_counts_reversed_weights():
    d, advantage, _ = batch(4)
    found = ratio_diagnostics(d, advantage, recipes.get("spo").objective.weight(d, advantage))
    ratio = d.exp()
    reversed_ = torch.sign(advantage) * (ratio - 1) > 0.2
    close(found["pull_back_fraction"], reversed_.double().mean())


def test_many_runs_in_one_call_equal_each_alone():
    d, advantage, mask = batch(5, (2, 3, 512))
    together = ratio_diagnostics(d, advantage, advantage * d, mask)
    for i in range(2):
        for j in range(3):
            rows = d[i, j], advantage[i, j], advantage[i, j] * d[i, j]
            alone = ratio_diagnostics(*rows, mask[i, j])
            chosen = ratio_diagnostics(*(x[mask[i, j]] for x in rows))
            for key, value in together.items():
                assert value.shape == (2, 3)
                close(value[i, j], alone[key], rtol=1e-12, atol=0)
                close(value[i, j], chosen[key], rtol=1e-10, atol=1e-14)


def test_masked_and_nonfinite_elements_are_left_out_and_the_latter_counted():
    d, advantage, mask = batch(6)
    weight = advantage * d.exp()
    clean = ratio_diagnostics(d, advantage, weight, mask)
    junk = torch.tensor([NAN, INF, -INF, 1e4]).double().repeat(512)
    dirty = [torch.where(mask, x, junk) for x in (d, advantage, weight)]
    for key, value in ratio_diagnostics(*dirty, mask).items():
        assert torch.equal(value, clean[key]), key
    spoilt = torch.nonzero(mask).flatten()[:6]
    for x, (a, b), value in zip(
        (d, advantage, weight), ((0, 2), (2, 4), (4, 6)), (NAN, INF, -INF), strict=True
    ):
        x[spoilt[a:b]] = value
    without = mask.clone()
    without[spoilt] = False
    found = ratio_diagnostics(d, advantage, weight, mask)
    assert float(found.pop("nonfinite")) == 6
    for key, value in found.items():
        assert torch.isfinite(value)
        assert torch.equal(value, ratio_diagnostics(d, advantage, weight, without)[key]), key


def test_nothing_to_measure_is_nan_not_a_number_that_looks_good():
    d, advantage, mask = batch(7, (2, 32))
    found = ratio_diagnostics(d, advantage, advantage, mask & False)
    assert (found.pop("nonfinite") == 0).all()
    for key, value in found.items():
        assert torch.isnan(value).all(), key
    found = ratio_diagnostics(d, advantage * 0, advantage)
    unmeasured = {key for key, value in found.items() if torch.isnan(value).any()}
    assert unmeasured == {
        "active_clip_fraction",
        "gate_acceptance",
        "pull_back_fraction",
        "weight_mean",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ppo", "rgpo-gate", "spo", "reinforce"])
def test_extremes_are_finite_and_not_clipped(name, dtype):
    d = torch.linspace(-1e4, 1e4, 101).to(dtype)
    advantage = torch.ones(101, dtype=dtype)
    advantage[::3] = -1e-30
    weight = recipes.get(name).objective.weight(d.float(), advantage.float())
    found = ratio_diagnostics(d, advantage, weight)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value), key
    assert float(found["ratio_spread"]) == float(d[-1])
    assert float(found["ratio_min"]) == 0.0
    assert float(found["ratio_max"]) > 3.4e38  # saturated at the largest float only
    largest = torch.finfo(torch.float32).max  # of 101 samples 50 saturate: their mean does not
    assert float(found["kl_k3"]) == pytest.approx(50 / 101 * largest, rel=1e-3)
    assert float(found["ess"]) == pytest.approx(1 / 101)
    assert 0 <= float(found["gate_acceptance"]) <= 1


def test_tiny_advantages_neither_overflow_nor_vanish():
    d = torch.full((16,), -80.0)
    advantage = torch.full((16,), 1e-30)
    found = ratio_diagnostics(d, advantage, d.exp() * advantage)  # 1.8e-65 underflows to 0
    assert float(found["active_clip_fraction"]) == 1
    found = ratio_diagnostics(d, advantage, advantage / 2)
    assert float(found["gate_acceptance"]) == 1
    assert float(found["weight_mean"]) == pytest.approx(0.5)


def test_kl_spike_rate():
    kl = torch.tensor([[0.01, 0.04, 0.05, NAN], [0.0, 0.0, 0.0, INF]])
    assert kl_spike_rate(kl).tolist() == [0.5, 0.25]
    assert kl_spike_rate(kl, threshold=0.001).tolist() == [1.0, 0.25]


def test_explained_variance():
    """Returns 1 2 3 4 have squared deviation 5; errors 0 0 1 1 have 1: 1 - 1/5."""
    returns = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    value = torch.tensor([1.0, 2, 2, 3], dtype=torch.float64)
    assert float(explained_variance(value, returns)) == pytest.approx(0.8)
    assert float(explained_variance(returns + 3, returns)) == pytest.approx(1)
    assert float(explained_variance(returns * 0, returns)) == pytest.approx(0)
    assert math.isnan(float(explained_variance(value, returns * 0)))
    rows = explained_variance(torch.stack([value, returns]), torch.stack([returns, returns]))
    assert rows.tolist() == pytest.approx([0.8, 1])
    dirty = torch.cat([returns, torch.tensor([NAN, INF]).double()])
    padded = torch.cat([value, torch.tensor([5.0, NAN]).double()])
    mask = torch.tensor([True] * 4 + [False] * 2)
    assert float(explained_variance(padded, dirty, mask)) == pytest.approx(0.8)


def test_wrong_use_is_refused_by_name():
    d, advantage, mask = batch(8, (2, 4))
    with pytest.raises(ValueError, match=r"weight \(4,\)"):
        ratio_diagnostics(d, advantage, advantage[0])
    with pytest.raises(ValueError, match="mask must be boolean"):
        ratio_diagnostics(d, advantage, advantage, mask.double())
    with pytest.raises(ValueError, match="advantage must be a floating"):
        ratio_diagnostics(d, advantage.long(), advantage)
    for empty in (d[:, :0], d[0, 0]):
        with pytest.raises(ValueError, match=r"\(\.\.\., B\) with B > 0"):
            ratio_diagnostics(empty, empty, empty)


def test_inference_mode_and_no_host_read():
    d, advantage, mask = batch(9, (3, 64))
    with torch.inference_mode():
        found = ratio_diagnostics(d, advantage, advantage, mask)
        assert all(torch.isfinite(value).all() for value in found.values())
    d, mask = d.to("meta").requires_grad_(), mask.to("meta")
    for value in ratio_diagnostics(d, d, d, mask).values():
        assert value.shape == (3,)
        assert value.device.type == "meta"
        assert not value.requires_grad
    assert explained_variance(d, d, mask).shape == (3,)
