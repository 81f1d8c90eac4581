"""What a claim's check returns, and what the checks share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import plotly.graph_objects as go
import torch
from torch import Tensor

from rgpo.core import recipes
from rgpo.core.objective import Objective

Published = Literal["holds", "fails", "no claim"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    claim: str
    """The statement that `holds` speaks of, in words."""

    tested: str
    """How."""

    measured: str
    """What came out."""

    bound: str
    """What it is held against."""

    holds: bool
    """Whether the statement, as this library makes it, passed."""

    published: Published = "holds"
    """Whether the paper's own version of it does."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The measurement for programs: JSON with finite numbers."""


@dataclass(frozen=True)
class Picture:
    """A figure with the sentence that explains it."""

    title: str
    """Its heading."""

    read: str
    """How to read it."""

    figure: go.Figure
    """What is drawn."""


@dataclass(frozen=True)
class Finding:
    """One claim, checked."""

    name: str
    """One word."""

    statement: str
    """The claim in plain words, with what is known against it."""

    rows: list[Row]
    """The table's lines."""

    pictures: list[Picture]
    """The page's figures."""

    note: str = ""
    """What is told below the table."""

    @property
    def holds(self) -> bool:
        """Whether every row does."""
        return all(row.holds for row in self.rows)


def element_objectives(*, bounded: bool) -> dict[str, Objective]:
    """Registered objectives that need no more than ratio and advantage, one element at a time.

    With `bounded` only those whose weight is. Recipes with equal objectives share an entry, under
    all their names.
    """
    names: dict[Objective, list[str]] = {}
    for recipe in recipes.recipes():
        o = recipe.objective
        plain = o.scope == "element" and not o.needs and o.homogeneous
        if plain and (o.sup_weight < float("inf") or not bounded):
            names.setdefault(o, []).append(recipe.name)
    return {", ".join(own): objective for objective, own in names.items()}


def generator(seed: int) -> torch.Generator:
    """A source of random numbers of its own: no claim's numbers depend on another's."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, source: torch.Generator) -> Tensor:
    """Standard normal float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=source)


def brief(count: int) -> str:
    """A power of ten in short."""
    return f"{count:.0e}".replace("+0", "")


def quantiles(x: Tensor, *shares: float) -> list[float]:
    """Quantiles of all elements but NaN, as numbers."""
    return torch.nanquantile(x, torch.tensor(shares, dtype=x.dtype)).tolist()
