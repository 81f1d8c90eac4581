"""Turns of an agent as the unit of the ratio, and steps normalised by the clipping bias."""

from rgpo.core.objectives.ppo import PPO
from rgpo.core.recipes import Recipe, register

_SOURCE = "formula and default 0.2: third-party notes"
_DIVISION = "division by a norm: third-party notes, which contradict; its floor: inferred"

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
        "s-ppo-variant",
        PPO(),
        paper="2511.20718",
        summary="PPO's gradient over the norm of what clipping took from it",
        reduction="sequence-mean",
        step="clip-normalized",
        confidence=_DIVISION,
    ),
    Recipe(
        "st-ppo-variant",
        PPO(),
        paper="2511.20718",
        summary="turn-ppo's gradient over the norm of what clipping took from it",
        level="turn",
        reduction="sequence-mean",
        step="clip-normalized",
        confidence=_DIVISION,
    ),
)
