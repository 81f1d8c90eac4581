import pytest
import tiny
import torch
from test_trainer import COMMON, train

from rgpo.errors import RgpoError
from rgpo.language import RecipeConfig, RecipeTrainer
from rgpo.language.critic import Critic, token_advantages, token_rewards, value_loss

BASELINE = {"recipe": "ppo", "advantage": "critic", "critic_learning_rate": 3e-3}


def ragged(batch=5, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 1, 0, 5])
    mask = torch.arange(width) < lengths[:, None]
    return mask, [torch.randn(batch, width, generator=generator) for _ in range(4)]


def test_reward_is_the_kl_per_token_and_the_score_at_the_end():
    mask, (log_prob, reference, _, _) = ragged()
    log_prob[~mask] = torch.inf
    score = torch.tensor([1.0, 2, 3, 4, 5])
    rewards = token_rewards(score, mask, log_prob, reference, beta=0.1)
    for row in range(5):
        length = int(mask[row].sum())
        expected = -0.1 * (log_prob[row, :length] - reference[row, :length])
        if length:
            expected[-1] += score[row]
        torch.testing.assert_close(rewards[row, :length], expected)
        assert (rewards[row, length:] == 0).all()
    without = token_rewards(score, mask, log_prob, None, beta=0.1)
    assert without.sum() == score[mask.any(1)].sum()


def test_advantages_are_gae_by_hand():
    mask, (rewards, values, _, _) = ragged()
    rewards[~mask] = torch.nan
    values[~mask] = torch.inf
    advantage, returns = token_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(5):
        length, carried = int(mask[row].sum()), 0.0
        for t in reversed(range(length)):
            following = values[row, t + 1].item() if t + 1 < length else 0.0
            delta = rewards[row, t].item() + 0.9 * following - values[row, t].item()
            carried = delta + 0.9 * 0.8 * carried
            assert advantage[row, t].item() == pytest.approx(carried, rel=1e-5, abs=1e-5)
            expected = carried + values[row, t].item()
            assert returns[row, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (advantage[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_value_loss_is_the_larger_of_clipped_and_unclipped():
    value = torch.tensor([1.0, 1.0, 0.1])
    old, returns = torch.zeros(3), torch.tensor([2.0, 0.0, 1.0])
    expected = [0.5 * 1.8**2, 0.5 * 1.0, 0.5 * 0.9**2]
    assert value_loss(value, old, returns, 0.2).tolist() == pytest.approx(expected)
    assert value_loss(value, old, returns, 0.0).tolist() == pytest.approx([0.5, 0.5, 0.405])


def test_values_do_not_depend_on_padding_and_come_before_their_token():
    critic = Critic.from_reward_model(tiny.reward_model()).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    padded = torch.tensor([[0, 0, 5, 6, 7, 8, 9]])
    ones = torch.ones_like
    with torch.no_grad():
        plain = critic(ids, ones(ids), 3)
        shifted = critic(padded, (padded != 0).long(), 3)
        other_last = critic(torch.tensor([[5, 6, 7, 8, 30]]), ones(ids), 3)
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, other_last)
    assert plain.std() > 0


def test_a_critic_starts_as_its_reward_model_or_at_zero():
    model = tiny.reward_model().eval()
    critic = Critic.from_reward_model(model).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        score = model(input_ids=ids[:, :-1], attention_mask=torch.ones(1, 4).long()).logits
        torch.testing.assert_close(critic(ids, torch.ones_like(ids), 1), score)
        fresh = Critic.from_policy(tiny.policy())(ids, torch.ones_like(ids), 3)
    assert (fresh == 0).all()
    assert all(p.requires_grad for p in critic.parameters())


def test_misfits_are_refused():
    policy = tiny.policy()
    with pytest.raises(RgpoError, match="tokens"):
        Critic.from_reward_model(tiny.reward_model(vocab_size=90)).refuse_misfit(policy)
    with pytest.raises(RgpoError, match="one label"):
        Critic.from_reward_model(tiny.reward_model(num_labels=2))
    encoder = tiny.encoder(policy.config.vocab_size)
    head = torch.nn.Linear(64, 1)
    with pytest.raises(RgpoError, match="looks ahead"):
        Critic(encoder, head).refuse_misfit(policy)


def test_ppo_rlhf_trains_policy_and_critic(tmp_path):
    """The ratio of the first minibatch is 1 (detail 25), the critic learns, the KL is paid."""
    model = tiny.policy(tmp_path / "model")
    options = COMMON | BASELINE | {"beta": 0.05, "kl_in": "reward", "max_steps": 40}
    options |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    args = RecipeConfig(str(tmp_path), use_cpu=True, **options)
    trainer, rows = train(RecipeTrainer, args, model, critic=tiny.reward_model())
    assert rows[0]["ratio/ratio_spread"] == pytest.approx(0, abs=1e-5)
    losses = [row["critic/value_loss"] for row in rows]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-3:]) / 3 > rewards[0]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(trainer.optimizer.param_groups) == 3
    assert trainer.optimizer.param_groups[2]["lr"] == 3e-3


@pytest.mark.parametrize("whitened", [True, False])
def test_advantages_are_whitened_over_the_generated_batch(whitened, tmp_path):
    options = COMMON | BASELINE | {"whiten_advantages": whitened}
    trainer = RecipeTrainer(
        tiny.policy(),
        tiny.vowels,
        RecipeConfig(str(tmp_path), use_cpu=True, **options),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
        critic=tiny.reward_model(),
    )
    trainer.model.train()
    batch = trainer._batch([trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    mask, plain = batch["completion_mask"].bool(), batch["returns"] - batch["old_values"]
    expected = plain[mask]
    if whitened:
        expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(batch["advantages"][mask], expected, rtol=1e-4, atol=1e-5)
    assert (batch["advantages"][~mask] == 0).all()


def test_gradients_of_the_critic_are_its_own(tmp_path):
    """The policy's gradient norm is what it is without the critic's loss; the critic's is clipped
    and cleared."""
    args = RecipeConfig(str(tmp_path), use_cpu=True, **COMMON | BASELINE | {"max_grad_norm": 0.01})
    trainer, rows = train(RecipeTrainer, args, tiny.policy())
    assert all(row["critic/grad_norm"] > 0.01 for row in rows)
    assert all(p.grad is None or (p.grad == 0).all() for p in trainer.critic.parameters())
    assert rows[0]["critic/value_mean"] == 0
