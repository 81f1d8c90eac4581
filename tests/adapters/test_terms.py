"""What the adapters of language trainers share."""

import pytest
import torch

from rgpo.adapters.terms import element_terms, token_recipe, turns
from rgpo.core import recipes
from rgpo.core.kl import k3
from rgpo.core.loss import policy_loss
from rgpo.errors import RgpoError


def test_a_turn_is_a_run_of_unmasked_tokens():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    expected = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(turns(mask), expected)


def batch():
    torch.manual_seed(0)
    log_prob = -torch.rand(3, 8)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1]).bool().expand(3, 8)
    return log_prob, log_prob - 0.3 * torch.randn(3, 8), torch.randn(3, 8), mask


def test_turn_recipes_see_those_turns():
    log_prob, behavior, advantage, mask = batch()
    terms, _ = element_terms(recipes.get("turn-ppo"), log_prob, behavior, advantage, mask)
    ids = torch.tensor([0, 7, 7, 0, 0, 9, 9, 9]).expand(3, 8)
    expected = policy_loss("turn-ppo", log_prob, behavior, advantage, mask, segment_ids=ids)
    torch.testing.assert_close(terms, -expected.surrogate)
    assert terms[~mask].count_nonzero() == 0


def test_the_penalty_is_in_the_terms():
    log_prob, behavior, advantage, mask = batch()
    with_kl, _ = element_terms(recipes.get("rgpo"), log_prob, behavior, advantage, mask)
    without, _ = element_terms(recipes.get("rgpo-gate"), log_prob, behavior, advantage, mask)
    kl = torch.where(mask, k3(log_prob - behavior), 0)
    torch.testing.assert_close(with_kl, without + recipes.get("rgpo").kl.coefficient * kl)


def test_one_action_is_one_element():
    log_prob, behavior, advantage, mask = (x[0] for x in batch())
    terms, _ = element_terms(recipes.get("ppo"), log_prob, behavior, advantage, mask)
    expected = policy_loss("ppo", log_prob, behavior, advantage, mask)
    torch.testing.assert_close(terms, -expected.surrogate)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("decoupled-ppo", "proximal_log_ratio"),
        ("trpo", "natural-gradient"),
        ("r2vpo-dual-variant", "update to update"),
        ("bapo", "all samples of an optimiser step"),
        ("dpo", "one prompt"),
        ("sapoo", "did you mean"),
    ],
)
def test_refusals_name_the_reason(recipe, word):
    with pytest.raises(RgpoError, match=word):
        token_recipe(recipe, {}, "this host")


def test_options_are_checked():
    assert token_recipe("rgpo", {"sharpness": 3.0}, "this host").objective.sharpness == 3.0
    with pytest.raises(RgpoError, match="no hyper-parameter"):
        token_recipe("rgpo", {"sharpnes": 3.0}, "this host")
