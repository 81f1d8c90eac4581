"""Random batches for the contract tests: log-probs, masks, ratios far from 1."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent


def run_example(page: str, containing: str, **names: object) -> dict:
    """Run the one Python block of a page that holds `containing`, as a reader would paste it.

    `names` may stand for its builtins.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if containing in block]
    names = {"__name__": "example", **names}
    exec(compile(code, page, "exec"), names)  # noqa: S102
    return names


@dataclass
class TokenBatch:
    """(B, T) tokens, or (B,) actions; ratios of the unmasked elements from about 1/20 to 20."""

    log_prob: Tensor
    """A leaf that requires its gradient."""

    behavior_log_prob: Tensor
    reference_log_prob: Tensor
    advantage: Tensor
    mask: Tensor
    """Boolean; every row has at least one True."""


def token_batch(
    *shape: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> TokenBatch:
    """log-ratio ~ spread * N(0, 1) (so that both sides of every clip are hit), A ~ N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_prob = -1.5 + 0.7 * normal()
    behavior, reference = log_prob - spread * normal(), log_prob - spread * normal()
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[..., 0] = True
    return TokenBatch(
        log_prob.to(dtype).requires_grad_(),
        behavior.to(dtype),
        reference.to(dtype),
        normal().to(dtype),
        mask,
    )


def with_extremes(batch: TokenBatch, log_ratio: float = 200.0) -> TokenBatch:
    """The batch with one unmasked and one masked element at `log_ratio`, A < 0 in both."""
    masked = (~batch.mask).nonzero()[0].tolist()
    unmasked = batch.mask.nonzero()[-1].tolist()
    behavior, advantage = batch.behavior_log_prob.clone(), batch.advantage.clone()
    for index in (tuple(masked), tuple(unmasked)):
        behavior[index] = batch.log_prob.detach()[index] - log_ratio
        advantage[index] = -advantage[index].abs()
    return TokenBatch(
        batch.log_prob.detach().clone().requires_grad_(),
        behavior,
        batch.reference_log_prob,
        advantage,
        batch.mask,
    )
