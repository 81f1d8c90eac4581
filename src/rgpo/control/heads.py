"""What leaves the networks, with its derivative by hand: log-probabilities, KL, entropy, values.

A head returns log pi (R, B) of the actions, and a function that gives the gradient of the loss

    sum of  - force log pi  +  forward KL(old || new)  +  reverse KL(new || old)  -  bonus entropy

in the head's inputs. The four coefficients are (R, B), the sample's share included; the last three
may be None for 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Backward = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]
]
"""Takes force, old parameters (R, B, P), forward, reverse and bonus; gives the gradients in the
outputs of the network (R, B, K), and in the log deviation (R, A) where there is one."""


def gaussian_head(mean: Tensor, log_std: Tensor, action: Tensor) -> tuple[Tensor, Backward]:
    """Log pi (R, B) of a diagonal normal, and its gradient as a function of the forces on it.

    Without the log-determinant of a squashed normal, which drops out of the ratio.
    """
    inverse = torch.exp(-log_std)
    z = (mean - action) * inverse
    square = z * z
    constant = log_std.sum(-1) + 0.5 * math.log(2 * math.pi) * log_std.shape[-1]
    log_prob = -torch.add(constant, square.sum(-1), alpha=0.5)

    def backward(
        force: Tensor,
        old: Tensor,
        forward_kl: Tensor | None,
        reverse_kl: Tensor | None,
        bonus: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return d loss / d mean (R, B, A) and d loss / d log_std (R, A)."""
        force = force.unsqueeze(-1)
        d_mean = z * inverse * force
        d_log_std = torch.addcmul(force, square, force, value=-1).sum(1)
        old_mean, old_log_std = old.chunk(2, -1)
        if forward_kl is not None:
            shift = (mean - old_mean) * inverse
            kl = forward_kl.unsqueeze(-1)
            d_mean = d_mean + shift * inverse * kl
            spread = torch.exp(2 * (old_log_std - log_std))
            d_log_std = d_log_std + ((1 - spread - shift * shift) * kl).sum(1)
        if reverse_kl is not None:
            kl = reverse_kl.unsqueeze(-1)
            d_mean = d_mean + (mean - old_mean) * torch.exp(-2 * old_log_std) * kl
            d_log_std = d_log_std + (torch.expm1(2 * (log_std - old_log_std)) * kl).sum(1)
        if bonus is not None:
            d_log_std = d_log_std - bonus.sum(1, keepdim=True)
        return d_mean, d_log_std

    return log_prob, backward


def categorical_head(logits: Tensor, _: None, action: Tensor) -> tuple[Tensor, Backward]:
    """Log pi (R, B) of one categorical action, and its gradient as a function of the forces."""
    log_probs = torch.log_softmax(logits, -1)
    log_prob = log_probs.gather(-1, action).squeeze(-1)

    def backward(
        force: Tensor,
        old: Tensor,
        forward_kl: Tensor | None,
        reverse_kl: Tensor | None,
        bonus: Tensor | None,
    ) -> tuple[Tensor, None]:
        """Return d loss / d logits (R, B, n)."""
        probs = torch.exp(log_probs)
        force = force.unsqueeze(-1)
        d_logits = (probs * force).scatter_add(-1, action, -force)
        if forward_kl is not None:
            d_logits = d_logits + (probs - torch.softmax(old, -1)) * forward_kl.unsqueeze(-1)
        if reverse_kl is not None:
            distance = log_probs - torch.log_softmax(old, -1)
            mean = (probs * distance).sum(-1, keepdim=True)
            d_logits = d_logits + probs * (distance - mean) * reverse_kl.unsqueeze(-1)
        if bonus is not None:
            entropy = -(probs * log_probs).sum(-1, keepdim=True)
            d_logits = d_logits + probs * (log_probs + entropy) * bonus.unsqueeze(-1)
        return d_logits, None

    return log_prob, backward


def value_gradient(value: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Derivative of half the squared error, or of PPO2's clipped maximum around the old value."""
    error = value - returns
    if clip is None:
        return error
    change = value - old
    clipped = old + torch.clamp(change, -clip, clip) - returns
    inside = torch.where(change.abs() <= clip, clipped, 0)
    return torch.where(error**2 >= clipped**2, error, inside)
