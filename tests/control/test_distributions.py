"""Against torch.distributions in float64, sampling against probabilities, and the extremes."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import distributions as td

from rgpo.control.distributions import (
    Bernoulli,
    Categorical,
    Normal,
    SquashedNormal,
    distribution_for,
)
from rgpo.errors import RgpoError

BOX = Box(np.array([-1, -2], np.float32), np.array([1, 6], np.float32))
CASES = {
    "normal": (BOX, False),
    "squashed": (BOX, True),
    "discrete": (Discrete(5, start=-1), False),
    "multidiscrete": (MultiDiscrete([3, 2, 4]), False),
    "multibinary": (MultiBinary(3), False),
}


@pytest.fixture(params=CASES)
def head(request):
    space, squash = CASES[request.param]
    return distribution_for(space, squash=squash)


def reference(head, params):
    """The same distribution by torch, over the environment's actions of `head`."""
    if isinstance(head, Normal):
        mean, log_std = params.chunk(2, -1)
        normal = td.Normal(mean, log_std.exp())
        if isinstance(head, SquashedNormal):
            low, high = torch.tensor(head.low).double(), torch.tensor(head.high).double()
            rescale = td.AffineTransform((low + high) / 2, (high - low) / 2)
            return td.TransformedDistribution(normal, [td.TanhTransform(), rescale])
        return normal
    if isinstance(head, Bernoulli):
        return td.Bernoulli(logits=params)
    return [td.Categorical(logits=part) for part in params.split(head.sizes, -1)]


def draw(head, count, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = scale * torch.randn(count, head.parameters, generator=generator).double()
    kind = torch.randn if head.noise == "normal" else torch.rand
    noise = kind(count, head.noise_size, generator=generator, dtype=torch.float64)
    return params, noise


def test_shapes_and_dtypes(head):
    params, noise = draw(head, 6)
    params, noise = params.float().reshape(2, 3, -1), noise.float().reshape(2, 3, -1)
    action = head.sample(params, noise)
    assert action.shape == head.mode(params).shape == (2, 3, head.action_size)
    assert action.dtype == head.mode(params).dtype == head.action_dtype
    for value in (head.log_prob(params, action), head.entropy(params), head.kl(params, params)):
        assert value.shape == (2, 3)
        assert value.dtype == torch.float32


def test_log_prob(head):
    params, noise = draw(head, 50)
    action = head.sample(params, noise)
    theirs = reference(head, params)
    if isinstance(head, Categorical):
        parts = zip(theirs, action.unbind(-1), strict=True)
        expected = sum(part.log_prob(index) for part, index in parts)
    elif isinstance(head, SquashedNormal):
        expected = theirs.log_prob(torch.as_tensor(unclipped(head, action))).sum(-1)
    else:
        expected = theirs.log_prob(action.double()).sum(-1)
    torch.testing.assert_close(head.log_prob(params, action), expected, rtol=1e-7, atol=1e-7)


def unclipped(head, action):
    low, high = np.array(head.low), np.array(head.high)
    return (low + high) / 2 + (high - low) / 2 * np.tanh(action.numpy())


def base(head, params):
    """As `reference`, without the squashing: entropy and KL are defined there."""
    theirs = reference(head, params)
    return theirs.base_dist if isinstance(head, SquashedNormal) else theirs


def test_entropy(head):
    params, _ = draw(head, 50)
    theirs = base(head, params)
    if isinstance(theirs, list):
        expected = sum(part.entropy() for part in theirs)
    else:
        expected = theirs.entropy().sum(-1)
    torch.testing.assert_close(head.entropy(params), expected)


def test_kl(head):
    params, _ = draw(head, 50)
    other, _ = draw(head, 50, seed=1)
    ours, theirs = base(head, params), base(head, other)
    if isinstance(ours, list):
        expected = sum(td.kl_divergence(p, q) for p, q in zip(ours, theirs, strict=True))
    else:
        expected = td.kl_divergence(ours, theirs).sum(-1)
    torch.testing.assert_close(head.kl(params, other), expected)
    torch.testing.assert_close(head.kl(params, params), torch.zeros(50).double())


def test_kl_is_the_mean_log_ratio_of_samples(head):
    """Ties sample, log_prob and kl together, the squashed ones included."""
    params, _ = draw(head, 1, scale=0.5)
    other, _ = draw(head, 1, seed=1, scale=0.5)
    _, noise = draw(head, 200_000, seed=2)
    params, other = params.expand(len(noise), -1), other.expand(len(noise), -1)
    action = head.sample(params, noise)
    difference = head.log_prob(params, action) - head.log_prob(other, action)
    error = float(difference.std()) / len(difference) ** 0.5
    assert abs(float(difference.mean()) - head.kl(params, other)[0].item()) < 4 * error


def test_sampling_frequencies():
    head = distribution_for(MultiDiscrete([4, 2]))
    params = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 0.0])
    noise = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    action = head.sample(params.expand(200_000, -1), noise)
    for index, part in enumerate(params.split([4, 2])):
        frequency = torch.bincount(action[:, index], minlength=len(part)) / len(action)
        torch.testing.assert_close(frequency, part.softmax(-1), rtol=0, atol=5e-3)
    bits = distribution_for(MultiBinary(2)).sample(params[:2].expand(200_000, -1), noise)
    torch.testing.assert_close(bits.float().mean(0), params[:2].sigmoid(), rtol=0, atol=5e-3)


def test_sampled_normals_have_their_moments():
    head = distribution_for(BOX)
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    action = head.sample(torch.tensor([[1.0, -3.0, -1.0, 0.5]]), noise)
    torch.testing.assert_close(action.mean(0), torch.tensor([1.0, -3.0]), rtol=0, atol=2e-2)
    torch.testing.assert_close(action.std(0), torch.tensor([-1.0, 0.5]).exp(), rtol=1e-2, atol=0)


def test_inverse_cdf_at_its_ends():
    """The largest float32 below 1 and 0 itself never select what has no probability."""
    head = distribution_for(Discrete(4))
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        inner = 5 * torch.randn(2, generator=generator)
        params = torch.cat([torch.tensor([-1e4]), inner, torch.tensor([-1e4])])
        assert head.sample(params, torch.tensor([0.0])).item() in {1, 2}
        assert head.sample(params, torch.tensor([almost_one])).item() in {1, 2}


def test_modes():
    assert distribution_for(Discrete(3)).mode(torch.tensor([0.0, 2.0, 1.0])).tolist() == [1]
    multi = distribution_for(MultiDiscrete([2, 3]))
    assert multi.mode(torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0])).tolist() == [0, 2]
    assert distribution_for(MultiBinary(2)).mode(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    assert distribution_for(BOX).mode(torch.tensor([3.0, 4.0, 0.0, 0.0])).tolist() == [3, 4]


def test_extremes_stay_finite(head):
    """Float32 parameters of +-1e4 (and opposite ones): values and gradients are finite."""
    signs = torch.tensor([1.0, -1.0])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(2, (2, head.parameters), generator=generator)
        p, q = (1e4 * signs[pick]).requires_grad_().unbind(0)
        noise = torch.rand(head.noise_size, generator=generator)
        action = head.sample(p, noise).detach()
        other = head.sample(q, noise).detach()
        terms = [head.log_prob(p, action), head.log_prob(p, other), head.entropy(p), head.kl(p, q)]
        for term in terms:
            assert torch.isfinite(term)
            gradients = torch.autograd.grad(term, (p, q), allow_unused=True, retain_graph=True)
            assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_squashed_actions_at_saturation():
    head = distribution_for(Box(-2, 2, (1,), np.float32), squash=True)
    action = torch.tensor([[-1e4], [-30.0], [0.0], [30.0], [1e4]])
    params = torch.cat([action, torch.zeros_like(action)], -1)
    np.testing.assert_array_equal(head.to_env(action.numpy())[:, 0], [-2, -2, 0, 2, 2])
    # At the mean, log N = -log(2 pi)/2; log slope = log 2 + 2 (log 2 - |u|) up to exp(-2|u|).
    tail = 2 * (np.log(2) - np.array([1e4, 30, np.log(2), 30, 1e4]))
    expected = -np.log(2 * np.pi) / 2 - np.log(2) - tail
    np.testing.assert_allclose(head.log_prob(params, action), expected, rtol=1e-6)


def test_to_env_gives_elements_of_the_space(head, request):
    space, _ = CASES[request.node.callspec.params["head"]]
    params, noise = draw(head, 40, scale=3.0)
    actions = head.to_env(head.sample(params, noise).numpy())
    assert actions.shape == (40, *space.shape)
    assert actions.dtype == space.dtype
    assert all(space.contains(action) for action in actions)


def test_to_env_by_hand():
    clipped = distribution_for(BOX).to_env(np.array([[0.5, 9.0], [-3.0, -2.5]], np.float32))
    np.testing.assert_array_equal(clipped, [[0.5, 6.0], [-1.0, -2.0]])
    squashed = distribution_for(BOX, squash=True).to_env(np.array([[0.0, 0.0]], np.float32))
    np.testing.assert_array_equal(squashed, [[0.0, 2.0]])
    assert distribution_for(Discrete(5, start=-1)).to_env(np.array([[0], [4]])).tolist() == [-1, 3]
    shifted = distribution_for(MultiDiscrete([3, 2], start=[10, 20]))
    assert shifted.to_env(np.array([[2, 1]])).tolist() == [[12, 21]]
    square = distribution_for(MultiDiscrete([[3, 2], [4, 5]]))
    assert square.to_env(np.array([[2, 1, 3, 4]])).tolist() == [[[2, 1], [3, 4]]]
    half = distribution_for(Box(np.float32(0), np.float32(np.inf), (1, 2)))
    assert half.to_env(np.array([[-1.0, 1e9]])).tolist() == [[[0.0, 1e9]]]


def test_sizes_by_hand():
    sizes = {
        name: (head.parameters, head.action_size, head.noise_size)
        for name, (space, squash) in CASES.items()
        for head in [distribution_for(space, squash=squash)]
    }
    assert sizes == {
        "normal": (4, 2, 2),
        "squashed": (4, 2, 2),
        "discrete": (5, 1, 1),
        "multidiscrete": (9, 3, 3),
        "multibinary": (3, 3, 3),
    }


@pytest.mark.parametrize(
    ("space", "squash", "sentence"),
    [
        (gym.spaces.Text(4), False, "Text.* is not supported"),
        (gym.spaces.Dict({"a": Discrete(2)}), False, "Dict.* is not supported"),
        (Box(0, 5, (2,), np.int32), False, "int32.* is not supported"),
        (Box(-np.inf, np.inf, (2,)), True, "no finite bounds"),
        (Discrete(3), True, r"not Discrete\(3\)"),
    ],
)
def test_refusals(space, squash, sentence):
    with pytest.raises(RgpoError, match=sentence):
        distribution_for(space, squash=squash)


def test_heads_are_values():
    assert distribution_for(BOX) == distribution_for(BOX)
    assert len({distribution_for(BOX), distribution_for(BOX, squash=True)}) == 2
