"""TRL: `rgpo.language` is the adapter; this is its name beside those of the other hosts."""

from rgpo.adapters.common import require_version

require_version("trl", "1.16.0", "1.17", extra="language")
from rgpo.language import RecipeConfig, RecipeTrainer  # noqa: E402

__all__ = ["RecipeConfig", "RecipeTrainer"]
