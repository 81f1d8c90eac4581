"""Reinforcement learning of language models with any recipe of the core, on TRL's GRPOTrainer."""

from rgpo.errors import RgpoError

try:
    import trl  # noqa: F401
except ImportError as error:
    raise RgpoError(
        f"{error.name} is not installed: install the extra with `pip install 'rgpo[language]'`"
    ) from None

from rgpo.language.config import RecipeConfig
from rgpo.language.reward_model import PreferenceConfig, RewardModel, train_reward_model
from rgpo.language.rewards import ensemble, with_eos_penalty, with_length_penalty
from rgpo.language.trainer import RecipeTrainer

__all__ = [
    "PreferenceConfig",
    "RecipeConfig",
    "RecipeTrainer",
    "RewardModel",
    "ensemble",
    "train_reward_model",
    "with_eos_penalty",
    "with_length_penalty",
]
