"""Identities and characteristic properties of the objectives that weigh elements and batches."""

import pytest
import torch

from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_signed import SignedRGPO

D = torch.linspace(-4, 4, 401, dtype=torch.float64)
BOTH = [1.7, -0.9]


@pytest.mark.parametrize("a", BOTH)
def test_signed_gate_is_rgpo_outward_and_importance_sampling_inward(a):
    advantage, outward = torch.full_like(D, a), D * a > 0
    weight = SignedRGPO(cap=1e9).weight(D, advantage)
    torch.testing.assert_close(weight[outward], RGPO().weight(D, advantage)[outward])
    torch.testing.assert_close(weight[~outward], (D.exp() * a)[~outward])


@pytest.mark.parametrize("a", BOTH)
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_signed_weights_never_lead_away_from_the_old_policy_faster_than_at_ratio_one(a, pull):
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
