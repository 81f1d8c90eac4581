"""What a policy's own answers are worth: proxy and gold reward, KL, length, entropy."""

from collections.abc import Sequence
from typing import Any

import torch

from rgpo.language.gold import Gold
from rgpo.language.reward_model import RewardModel
from rgpo.language.sample import Policy, Sample
from rgpo.language.stages import mean


def measured(
    policy: Policy,
    reference: Policy,
    reward: RewardModel,
    gold: Gold | None,
    samples: Sequence[Sample],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Means over a policy's own answers with standard errors, and the answers one by one.

    KL(policy || reference) is the mean of log pi - log pi_ref summed over an answer's tokens,
    entropy that of -log pi per token.
    """
    own, other = policy.log_probs(samples), reference.log_probs(samples)
    scores = reward([s.prompt for s in samples], [s.completion for s in samples])
    per_answer: dict[str, list[float]] = {
        "proxy": list(scores),
        "kl": [float((a - b).sum()) for a, b in zip(own, other, strict=True)],
        "length": [float(len(s.ids)) for s in samples],
    }
    if gold is not None:
        per_answer["gold"] = gold(samples)
    found: dict[str, Any] = {name: summary(values) for name, values in per_answer.items()}
    found["entropy"] = mean([float(-row.mean()) for row in own])
    found["cut"] = mean([float(not s.ended) for s in samples])
    found["different"] = len({s.text for s in samples}) / len(samples)
    rows = [
        {"prompt": s.prompt, "answer": s.text}
        | {name: values[i] for name, values in per_answer.items()}
        for i, s in enumerate(samples)
    ]
    return found, rows


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard error."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "se": float(tensor.std() / len(values) ** 0.5)}
