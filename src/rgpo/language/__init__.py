"""Reinforcement learning of language models with any recipe of the core, on TRL's GRPOTrainer."""

from rgpo.errors import RgpoError

try:
    import trl  # noqa: F401
except ImportError as error:
    raise RgpoError(
        f"{error.name} is not installed: install the extra with `pip install 'rgpo[language]'`"
    ) from None

from rgpo.language.config import RecipeConfig
from rgpo.language.trainer import RecipeTrainer

__all__ = ["RecipeConfig", "RecipeTrainer"]
