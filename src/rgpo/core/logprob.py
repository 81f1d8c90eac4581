"""Log-prob of chosen tokens and entropy, from hidden states and head weights, without the logits.

log_softmax and gather on N tokens over a vocabulary of V keep several (N, V) tensors for the
backward pass, and a Python loop of chunks under autograd keeps them all the same. Here the head is
applied to `chunk` tokens at a time, only the log-normaliser and the entropy, (N,) each, are kept,
and the backward pass computes the logits again. With z the logits of a token, p = softmax(z), y
the chosen token and H the entropy,

    log p_y = z_y - logsumexp(z)           d log p_y / d z_j = [j = y] - p_j
    H       = -sum_j p_j log p_j           d H / d z_j       = -p_j (log p_j + H)
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgpo.core.checks import require_floating, require_integer, working_dtype


def chosen_log_prob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Log-prob of `target` and entropy under softmax((hidden weight^T + bias) / temperature).

    `hidden` (N, H), `weight` (V, H) and `bias` (V,) floating, `target` (N,) integers in [0, V);
    ValueError otherwise. Returns two tensors (N,), both differentiable, once, by hidden, weight
    and bias. Computed and returned in float32 at least: lower precision is promoted before the
    product, which costs a float32 copy of the head. Beyond that and the gradients, the memory is
    two buffers of (chunk, V), whatever N.
    """
    _check(hidden, weight, target, bias)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    dtype = working_dtype(hidden, weight)
    scaled, head = hidden.to(dtype) / temperature, weight.to(dtype)
    offset = None if bias is None else bias.to(dtype) / temperature
    log_prob, entropy = _ChosenLogProb.apply(  # type: ignore[no-untyped-call]
        scaled, head, offset, target.long(), chunk
    )
    return log_prob, entropy


class _ChosenLogProb(torch.autograd.Function):
    """The computation in one dtype, the temperature already in `hidden` and `bias`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy, normaliser = (hidden.new_empty(len(hidden)) for _ in range(3))
        for part, z, p in _chunks(hidden, weight, bias, chunk):
            peak = z.amax(1)
            torch.exp(z.sub_(peak[:, None]), out=p)
            total = p.sum(1)
            log_total = torch.log(total)
            log_prob[part] = z.gather(1, target[part, None])[:, 0] - log_total
            entropy[part] = log_total - p.mul_(z).sum(1) / total
            normaliser[part] = log_total + peak
        ctx.save_for_backward(hidden, weight, bias, target, entropy, normaliser)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, entropy, normaliser = ctx.saved_tensors
        if by_log_prob is None:
            by_log_prob = torch.zeros_like(entropy)
        by_hidden, by_weight, by_bias = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for part, z, p in _chunks(hidden, weight, bias, ctx.chunk):
            torch.exp(z.sub_(normaliser[part, None]), out=p)  # z is log p from here
            towards = by_log_prob[part, None]
            if by_entropy is None:
                by_logits = p.mul_(-towards)
            else:
                flat = by_entropy[part, None]
                constant = -towards - flat * entropy[part, None]
                by_logits = torch.addcmul(constant, z, -flat, out=z).mul_(p)
            by_logits.scatter_add_(1, target[part, None], towards)
            if by_hidden is not None:
                torch.mm(by_logits, weight, out=by_hidden[part])
            if by_weight is not None:
                by_weight.addmm_(by_logits.T, hidden[part])
            if by_bias is not None:
                by_bias.add_(by_logits.sum(0))
        return by_hidden, by_weight, by_bias, None, None


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For every chunk of tokens its slice, its logits, and a buffer of their shape.

    The two buffers are the same for all chunks: what was in them is overwritten.
    """
    buffers = hidden.new_empty(2, min(chunk, len(hidden)), len(weight))
    for start in range(0, len(hidden), chunk):
        part = slice(start, min(start + chunk, len(hidden)))
        logits, spare = buffers[:, : part.stop - start]
        if bias is None:
            torch.mm(hidden[part], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.T, out=logits)
        yield part, logits, spare


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    require_floating(hidden=hidden, weight=weight, bias=bias)
    require_integer(target=target)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        told = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (N, H) and weight (V, H), got {told}")
    if target.shape != hidden.shape[:1]:
        told = f"{tuple(target.shape)} for hidden {tuple(hidden.shape)}"
        raise ValueError(f"target must be (N,), one chosen token per hidden state, got {told}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if bool(((target < 0) | (target >= len(weight))).any()):
        raise ValueError(
            f"target must hold token ids in [0, {len(weight)}): "
            "put any valid id where a token is masked, and mask its log-prob afterwards"
        )
