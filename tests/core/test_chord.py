"""Expert tokens: the paper's losses, the mixture of two streams and its schedule."""

import pytest
import torch

from rgpo.core.loss import policy_loss
from rgpo.core.objectives.chord import ExpertTokens, expert_share


def expert(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_prob = -3 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return log_prob.requires_grad_(), torch.rand(4, 6, generator=generator) < 0.7


@pytest.mark.parametrize("name", ["chord-phi", "chord-mu", "chord-is"])
def test_loss_and_gradient_are_those_of_the_paper(name):
    log_prob, mask = expert()
    p = log_prob.detach().exp()
    shaping = {"chord-phi": p * (1 - p), "chord-mu": 1.0, "chord-is": p}[name]
    expected = -(shaping * log_prob)[mask].sum() / mask.sum()
    zero, one = torch.zeros_like(log_prob), torch.ones_like(log_prob)
    found = policy_loss(name, log_prob, zero, one, mask).loss
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, log_prob)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, log_prob)[0])


def test_importance_weight_is_the_gradient_of_the_probability():
    """The ablation is importance sampling with an expert of probability 1: grad p."""
    log_prob, _ = expert(1)
    zero, one = torch.zeros_like(log_prob), torch.ones_like(log_prob)
    loss = policy_loss("chord-is", log_prob, zero, one).loss
    (gradient,) = torch.autograd.grad(loss, log_prob)
    (expected,) = torch.autograd.grad(-log_prob.exp().mean(), log_prob)
    torch.testing.assert_close(gradient, expected)


def test_share_of_the_expert_warms_up_and_decays():
    shares = [expert_share(t, peak=0.8, valley=0.2, warmup=4, decay=10) for t in range(30)]
    assert shares[:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert shares[9] == pytest.approx(0.5)  # half way down the cosine
    assert shares[14:] == pytest.approx([0.2] * 16)
    assert expert_share(0) == pytest.approx(0.9)
    assert expert_share(200) == pytest.approx(0.05)
    assert expert_share(0, decay=0) == pytest.approx(0.05)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown form"):
        ExpertTokens(form="sft")  # type: ignore[arg-type]
