"""Turns of an agent as the unit of the ratio, and steps normalised by the clipping bias."""

from rgpo.core.objectives.ppo import PPO
from rgpo.core.recipes import Recipe, register

_SOURCE = "formula and default 0.2: third-party notes"

register(
    Recipe(
        "turn-ppo",
        PPO(),
        paper="2511.20718",
        summary="PPO's clip on the length-normalised ratio of a turn, advantages per token",
        level="turn",
        reduction="sequence-mean",
        confidence=_SOURCE,
    ),
    Recipe(
        "s-ppo",
        PPO(),
        paper="2511.20718",
        summary="PPO's gradient over the norm of what clipping took from it",
        reduction="sequence-mean",
        step="clip-normalized",
        confidence=_SOURCE + "; floor of the norm: inferred",
    ),
    Recipe(
        "st-ppo",
        PPO(),
        paper="2511.20718",
        summary="turn-ppo's gradient over the norm of what clipping took from it",
        level="turn",
        reduction="sequence-mean",
        step="clip-normalized",
        confidence=_SOURCE + "; floor of the norm: inferred",
    ),
)
