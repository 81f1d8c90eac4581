"""Chunked log-prob and entropy against log_softmax and gather: value, gradient, memory."""

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rgpo.core.logprob import chosen_log_prob_and_entropy

close = torch.testing.assert_close


def inputs(n: int = 13, h: int = 5, v: int = 11, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(v, (n,), generator=generator)
    return (
        draw(n, h).requires_grad_(),
        draw(v, h).requires_grad_(),
        target,
        draw(v).requires_grad_(),
    )


def naive(hidden, weight, target, bias=None, temperature=1.0):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_by_hand():
    """Logits log 1, log 2, log 5 of the one hidden unit: p = 1/8, 2/8, 5/8."""
    weight = torch.tensor([[1.0], [2], [5]], dtype=torch.float64).log()
    log_prob, entropy = chosen_log_prob_and_entropy(
        torch.ones(1, 1, dtype=torch.float64), weight, torch.tensor([2])
    )
    assert float(log_prob) == pytest.approx(math.log(5 / 8))
    expected = -sum(p / 8 * math.log(p / 8) for p in (1, 2, 5))
    assert float(entropy) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("with_bias", "temperature", "chunk"), product([False, True], [1.0, 0.7], [1, 4, 13, 128])
)
def test_value_and_gradient_of_both_outputs_in_float64(with_bias, temperature, chunk):
    hidden, weight, target, bias = inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    found = chosen_log_prob_and_entropy(
        hidden, weight, target, bias=bias, temperature=temperature, chunk=chunk
    )
    expected = naive(hidden, weight, target, bias, temperature)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        # a different weight per token, so that tokens cannot be mixed up
        per_token = torch.linspace(-1, 2, len(target), dtype=torch.float64)
        totals = [((a * lp + b * e) * per_token).sum() for lp, e in (found, expected)]
        grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in totals]
        for got, wanted in zip(*grads, strict=True):
            close(got, wanted, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias):
    hidden, weight, target, bias = inputs(5, 3, 4)

    def function(h, w, b=None):
        return chosen_log_prob_and_entropy(h, w, target, bias=b, temperature=1.3, chunk=2)

    assert torch.autograd.gradcheck(
        function, (hidden, weight, bias) if with_bias else (hidden, weight)
    )


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which):
    """The other output's gradient arrives as None."""
    hidden, weight, target, _ = inputs()
    found = torch.autograd.grad(
        chosen_log_prob_and_entropy(hidden, weight, target)[which].sum(), (hidden, weight)
    )
    expected = torch.autograd.grad(naive(hidden, weight, target)[which].sum(), (hidden, weight))
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted, rtol=1e-12, atol=1e-12)


def test_frozen_inputs_get_no_gradient():
    hidden, weight, target, bias = inputs()
    log_prob, _ = chosen_log_prob_and_entropy(hidden, weight.detach(), target, bias=bias.detach())
    log_prob.sum().backward()
    close(hidden.grad, torch.autograd.grad(naive(hidden, weight, target, bias)[0].sum(), hidden)[0])
    log_prob, _ = chosen_log_prob_and_entropy(hidden.detach(), weight, target)
    log_prob.sum().backward()
    assert weight.grad.abs().max() > 0


def test_float32_is_right_to_rounding():
    hidden, weight, target, bias = inputs(64, 16, 500, torch.float32)
    single = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    double = [x.detach().double().requires_grad_() for x in single]
    found = chosen_log_prob_and_entropy(single[0], single[1], target, bias=single[2], chunk=20)
    expected = naive(double[0], double[1], target, double[2])
    for got, wanted in zip(found, expected, strict=True):
        close(got.double(), wanted, rtol=1e-5, atol=5e-6)
    (found[0] + found[1]).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    for got, wanted in zip(single, double, strict=True):
        close(got.grad.double(), wanted.grad, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_accumulated_in_float32():
    """Equal to promoting the inputs first; logits rounded to bfloat16 would be off by 1e-2."""
    hidden, weight, target, _ = inputs(20, 64, 50, torch.bfloat16)
    found = chosen_log_prob_and_entropy(hidden, weight, target)
    expected = naive(hidden.float(), weight.float(), target)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        close(got, wanted, rtol=1e-5, atol=1e-5)
    (found[0] + found[1]).sum().backward()
    got = hidden.grad.clone()
    hidden.grad = weight.grad = None
    (expected[0] + expected[1]).sum().backward()
    assert got.dtype == torch.bfloat16
    close(got, hidden.grad)


def test_autocast_does_not_lower_the_precision():
    hidden, weight, target, bias = inputs(20, 8, 50, torch.float32)
    expected = chosen_log_prob_and_entropy(hidden, weight, target, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = chosen_log_prob_and_entropy(hidden, weight, target, bias=bias)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_are_finite(dtype):
    """Logits of 1e4 and -1e4: log-probs 0 and -2e4, entropy 0."""
    hidden = torch.tensor([[1.0], [1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    log_prob, entropy = chosen_log_prob_and_entropy(hidden, weight, torch.tensor([0, 1]))
    assert log_prob.tolist() == [0, 2 * float(weight.detach()[1])]
    assert entropy.tolist() == [0, 0]
    (log_prob.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    assert weight.grad.flatten().tolist() == [-1, 1, 0]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_of_n_times_v_is_ever_made():
    n, h, v, chunk = 256, 4, 100, 8
    hidden, weight, target, _ = inputs(n, h, v)

    def largest(function):
        with Largest() as seen:
            log_prob, entropy = function(hidden, weight, target)
            (log_prob + entropy).sum().backward()
        return seen.elements

    assert largest(naive) >= n * v
    own = largest(lambda *args: chosen_log_prob_and_entropy(*args, chunk=chunk))
    assert own == max(2 * chunk * v, n * h)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    hidden, weight, target, _ = inputs(64, 4, 1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        chosen_log_prob_and_entropy(hidden, weight, target)
    assert sum(kept) < 2 * (hidden.numel() + weight.numel() + 3 * len(target))


def test_int32_targets_and_empty_batches():
    hidden, weight, target, _ = inputs()
    found = chosen_log_prob_and_entropy(hidden, weight, target.int())
    close(found, naive(hidden, weight, target))
    nothing = chosen_log_prob_and_entropy(hidden[:0], weight, target[:0])
    assert [x.shape for x in nothing] == [(0,), (0,)]
    nothing[0].sum().backward()
    assert not weight.grad.any()


def test_inference_mode():
    hidden, weight, target, bias = inputs()
    expected = naive(hidden, weight, target, bias)
    with torch.inference_mode():
        found = chosen_log_prob_and_entropy(hidden, weight, target, bias=bias, chunk=4)
        for got, wanted in zip(found, expected, strict=True):
            close(got, wanted.detach())


def test_wrong_use_is_refused_by_name():
    hidden, weight, target, bias = inputs()
    f = chosen_log_prob_and_entropy
    for wrong in (-1, -100, 11):
        spoilt = target.clone()
        spoilt[3] = wrong
        with pytest.raises(ValueError, match=r"token ids in \[0, 11\): put any valid id"):
            f(hidden, weight, spoilt)
    with pytest.raises(ValueError, match=r"hidden must be \(N, H\) and weight \(V, H\)"):
        f(hidden, weight.T, target)
    with pytest.raises(ValueError, match=r"hidden must be \(N, H\)"):
        f(hidden[None], weight, target)
    with pytest.raises(ValueError, match=r"target must be \(N,\)"):
        f(hidden, weight, target[1:])
    with pytest.raises(ValueError, match="target must be an integer"):
        f(hidden, weight, target.double())
    with pytest.raises(ValueError, match=r"bias must be \(11,\)"):
        f(hidden, weight, target, bias=bias[1:])
    with pytest.raises(ValueError, match="weight must be a floating"):
        f(hidden, weight.long(), target)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            f(hidden, weight, target, temperature=temperature)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        f(hidden, weight, target, chunk=0)
