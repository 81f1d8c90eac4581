"""Rewards as functions, and what is put around them.

A reward is any function that TRL takes: `reward(prompts, completions, completion_ids, **columns)`
gives one number per completion, or None where it has nothing to say. `RecipeTrainer` puts `checked`
around each, so that a reward that fails stops the run and shows the completion.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from rgpo.errors import RgpoError

Reward = Callable[..., Sequence[float | None]]


def name_of(reward: Any) -> str:
    """What a reward is called in logs and messages."""
    return getattr(reward, "__name__", type(reward).__name__)


def checked(reward: Reward) -> Reward:
    """The same reward, but what it does wrong stops the run.

    RgpoError with the completion if it raises or gives a number that is not finite, and with the
    counts if it does not give one number per completion.
    """

    def guarded(**batch: Any) -> Sequence[float | None]:
        try:
            scores = list(reward(**batch))
        except RgpoError:
            raise
        except Exception as error:
            raise RgpoError(_blame(reward, error, batch)) from error
        completions = batch["completions"]
        if len(scores) != len(completions):
            raise RgpoError(
                f"reward {name_of(reward)!r} gave {len(scores)} numbers for {len(completions)} "
                f"completions, the first of which is {completions[0]!r}"
            )
        for i, score in enumerate(scores):
            if score is not None and not math.isfinite(score):
                raise RgpoError(f"reward {name_of(reward)!r} gave {score} for {_told(batch, i)}")
        return scores

    return _named(guarded, name_of(reward))


def with_eos_penalty(reward: Reward, eos_token_id: int | list[int], score: float = -1.0) -> Reward:
    """`score` in place of the reward for completions that were cut at the length limit.

    The "EOS trick" of arXiv 2403.17031, detail 11: text without its end is outside what a reward
    model was trained on.
    """
    ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id

    def penalised(completion_ids: list[list[int]], **batch: Any) -> list[float | None]:
        scores = reward(completion_ids=completion_ids, **batch)
        ended = [bool(ids) and ids[-1] in ends for ids in completion_ids]
        return [s if whole else score for s, whole in zip(scores, ended, strict=True)]

    return _named(penalised, name_of(reward))


def with_length_penalty(reward: Reward, per_token: float, free: int = 0) -> Reward:
    """The reward minus `per_token` for every token beyond the first `free` ones."""

    def penalised(completion_ids: list[list[int]], **batch: Any) -> list[float | None]:
        scores = reward(completion_ids=completion_ids, **batch)
        excess = [max(len(ids) - free, 0) for ids in completion_ids]
        return [
            None if s is None else s - per_token * n for s, n in zip(scores, excess, strict=True)
        ]

    return _named(penalised, name_of(reward))


def ensemble(
    members: Sequence[Reward],
    how: Literal["mean", "worst", "variance-penalised"] = "variance-penalised",
    penalty: float = 0.1,
) -> Reward:
    """One reward of several, against over-optimisation of one (arXiv 2310.02743).

    Their mean, their minimum (WCO), or their mean minus `penalty` times their variance (UWO; over
    M - 1, and 0.1 as the paper has it in PPO). Members must be on one scale: with unequal offsets
    the minimum selects the lowest. RgpoError for less than two members or an unknown `how`.
    """
    if len(members) < 2:
        raise RgpoError(f"an ensemble needs two rewards at least, got {len(members)}")
    if how not in ("mean", "worst", "variance-penalised"):
        raise RgpoError(f"unknown ensemble {how!r}: choose mean, worst or variance-penalised")
    guarded = [checked(member) for member in members]

    def combined(**batch: Any) -> list[float | None]:
        scores = [list(member(**batch)) for member in guarded]
        for member, own in zip(members, scores, strict=True):
            if None in own:
                told = _told(batch, own.index(None))
                raise RgpoError(f"reward {name_of(member)!r} of an ensemble gave None for {told}")
        stacked = torch.tensor(scores, dtype=torch.float64)
        if how == "mean":
            return stacked.mean(0).tolist()
        if how == "worst":
            return stacked.amin(0).tolist()
        return (stacked.mean(0) - penalty * stacked.var(0)).tolist()

    return _named(combined, f"ensemble_{how.replace('-', '_')}")


def _blame(reward: Reward, error: Exception, batch: dict[str, Any]) -> str:
    """Which completion makes the reward raise, found by giving it one at a time."""
    size = len(batch["completions"])
    told = f"raised {type(error).__name__} ({error})"
    for i in range(size):
        alone = {
            key: column[i : i + 1] if isinstance(column, list) and len(column) == size else column
            for key, column in batch.items()
        }
        try:
            reward(**alone)
        except Exception as own:  # noqa: BLE001  the same function once more
            told = f"raised {type(own).__name__} ({own})"
            return f"reward {name_of(reward)!r} {told} for {_told(batch, i)}"
    return f"reward {name_of(reward)!r} {told} for {size} completions, for none of them alone"


def _told(batch: dict[str, Any], i: int) -> str:
    return f"completion {batch['completions'][i]!r} of prompt {batch['prompts'][i]!r}"


def _named(function: Reward, name: str) -> Reward:
    function.__name__ = name
    return function
