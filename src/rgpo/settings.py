"""What every configuration shares: numbers that make sense, JSON, and the recipe by name."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Self

from rgpo.core import recipes
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError


class Settings:
    """Base of frozen dataclasses with the fields `recipe` and `set`."""

    recipe: str
    set: tuple[str, ...]

    def _require(self, what: str, holds: Callable[[float], bool], names: tuple[str, ...]) -> None:
        """RgpoError naming the first field that is given and not as it must be."""
        for name in names:
            number = getattr(self, name)
            if number is not None and not holds(number):
                raise RgpoError(f"{name} must be {what}, got {number}")

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The configuration in a JSON object; what it does not know is left out."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        known = {name: document[name] for name in names if name in document}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})

    def resolve(self) -> Recipe:
        """The recipe with this run's hyper-parameters; RgpoError for a name that is not there."""
        return configured(self.recipe, self.set)


def split_arm(arm: str) -> tuple[str, tuple[str, ...]]:
    """Recipe and options of an arm of a comparison, "rgpo:sharpness=4,kl_target=0.02"."""
    recipe, _, options = arm.partition(":")
    return recipe, tuple(filter(None, options.split(",")))


def configured(recipe: str, options: tuple[str, ...]) -> Recipe:
    """The recipe with options name=value; RgpoError for names or numbers that it does not have."""
    try:
        return recipes.get(recipe).configure(**parse_options(options))
    except ValueError as error:
        raise RgpoError(str(error)) from None
    except TypeError:
        raise RgpoError(
            f"a hyper-parameter in {' '.join(options)!r} must be a number: "
            f"`rgpo objectives --names {recipe}` shows the defaults"
        ) from None


def parse_options(pairs: Iterable[str]) -> dict[str, float | str | None]:
    """Options name=value as a dictionary: numbers, None for "none", anything else as it is."""
    parsed: dict[str, float | str | None] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise RgpoError(f"--set takes name=value, got {pair!r}")
        name = name.replace("-", "_")
        try:
            parsed[name] = None if text.lower() == "none" else float(text)
        except ValueError:
            parsed[name] = text
    return parsed
