"""The critic: a value model of its own, and the advantages and the loss that come with it.

V(s_t) is the expected reward-to-go before token t is chosen, so it is read from the hidden state
of the token before. Defaults and details are those of arXiv 2403.17031 ("N+"), by number.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rgpo.core.advantage import gae
from rgpo.errors import RgpoError


class Critic(nn.Module):
    """A causal transformer with one number per token."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_policy(cls, policy: PreTrainedModel) -> Self:
        """A copy of the policy's backbone with a head that starts at value 0."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(copy.deepcopy(policy.base_model).float().requires_grad_(), head)

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel | str) -> Self:
        """A copy of a reward model (sequence classifier with one label) or of one on disk (19).

        It starts at the reward's scale, less the offset of `rgpo.language.RewardModel`.
        """
        if isinstance(model, str):
            model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise RgpoError(
                f"{type(model).__name__} cannot become a critic: give a sequence classifier with "
                "one label whose head is a linear layer named score"
            )
        start = nn.Linear(head.in_features, 1)
        with torch.no_grad():
            start.weight.copy_(head.weight)
            bias = 0.0 if head.bias is None else head.bias
            start.bias.copy_(bias - torch.tensor(getattr(model.config, "reward_offset", 0.0)))
        return cls(copy.deepcopy(model.base_model).float().requires_grad_(), start)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Values (B, T) before each of the last T tokens of `input_ids` (B, P + T); float32."""
        position_ids = torch.clamp(attention_mask.cumsum(1) - 1, min=0)
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        values: Tensor = self.head(hidden[:, -completion_length - 1 : -1]).squeeze(-1)
        return values.float()

    def refuse_misfit(self, policy: PreTrainedModel) -> None:
        """RgpoError unless the critic reads the policy's tokens, and from left to right only."""
        own = self.backbone.config.get_text_config().vocab_size
        needed = policy.config.get_text_config().vocab_size
        if own != needed:
            raise RgpoError(
                f"the critic knows {own} tokens and the policy {needed}: initialise the critic "
                "from a model with the policy's tokenizer"
            )
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % own
        device = next(self.parameters()).device
        was_training = self.training
        with torch.no_grad():
            self.eval()
            first, second = self(ids.to(device), torch.ones_like(ids).to(device), 3)
            self.train(was_training)
        if not torch.allclose(first, second, atol=1e-5):
            raise RgpoError(
                f"{type(self.backbone).__name__} looks ahead, so its values would know the future: "
                "initialise the critic from a causal model"
            )


def token_rewards(
    score: Tensor, mask: Tensor, log_prob: Tensor, reference: Tensor | None, beta: float
) -> Tensor:
    """Rewards (B, T): -beta * k1 per token (13), and the score (B,) at the last token (14).

    k1 = log pi - log pi_ref of the policy that generated; `mask` boolean (B, T). Rows without a
    token give 0 everywhere.
    """
    rewards = torch.zeros_like(log_prob)
    if reference is not None:
        rewards = torch.where(mask, -beta * (log_prob - reference), 0)
    return rewards + torch.where(_last(mask), score.unsqueeze(1), 0)


def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE and returns (B, T) of completions that end at their last token (16); 0 where masked.

    A completion that was cut at the length limit ends there as well: the reward scored that text.
    """
    values = torch.where(mask, values, 0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    over = _last(mask) | ~mask
    rewards = torch.where(mask, rewards, 0)
    cut = torch.zeros_like(over).T
    advantage, returns = gae(rewards.T, values.T, after.T, over.T, cut, gamma, lam)
    return torch.where(mask, advantage.T, 0), torch.where(mask, returns.T, 0)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 max((V - R)^2, (clipped V - R)^2) per token (21); clip 0: without the second."""
    loss = (value - returns) ** 2
    if clip > 0:
        clipped = old_value + torch.clamp(value - old_value, -clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return loss / 2


class CriticStep(TrainerCallback):
    """Clips and clears the critic's gradients, which TRL's loop does for the policy's alone."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Clip by the critic's own norm."""
        limit = args.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.trainer.critic.parameters(), limit)
        self.trainer.record("critic/grad_norm", norm.item())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Start the next step from zero."""
        self.trainer.critic.zero_grad()


def _last(mask: Tensor) -> Tensor:
    """True at the last unmasked token of every row of `mask` (B, T)."""
    later = mask.flip(1).cumsum(1).flip(1)
    return mask & (later == 1)
