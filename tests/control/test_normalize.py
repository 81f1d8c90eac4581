"""Running moments against NumPy on everything seen so far; normalisation by hand."""

import numpy as np
import pytest

from rgpo.control.normalize import ObservationNormalizer, RewardScaler, RunningMoments


def test_moments_are_those_of_all_samples():
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3, 5, (2, n, 3)) for n in (1, 7, 50)]
    moments = RunningMoments(2, (3,))
    for batch in batches:
        moments.update(batch.astype(np.float32))
    seen = np.concatenate(batches, axis=1).astype(np.float32).astype(np.float64)
    # the start, mean 0 and variance 1, weighs as much as 1e-4 samples
    weight = 1e-4 / (seen.shape[1] + 1e-4)
    mean = (1 - weight) * seen.mean(1)
    variance = (1 - weight) * (seen.var(1) + weight * seen.mean(1) ** 2) + weight
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-9)
    np.testing.assert_allclose(moments.count, 58 + 1e-4)


def test_moments_of_one_run_move_to_another_place():
    moments, other = RunningMoments(2, (3,)), RunningMoments(1, (3,))
    moments.update(np.random.default_rng(0).normal(size=(2, 5, 3)))
    other.restore(0, moments.state(1))
    for name in ("mean", "variance", "count"):
        np.testing.assert_array_equal(getattr(other, name)[0], getattr(moments, name)[1])
    other.update(np.ones((1, 4, 3)))
    assert moments.count[1] == 5 + 1e-4  # a copy


def test_observations_are_normalised_per_run_and_clipped():
    normalizer = ObservationNormalizer(2, 1, enabled=True)
    samples = np.array([[[1.0], [3.0]], [[10.0], [30.0]]])
    normalizer.moments.update(samples)
    vector = np.array([[[3.0], [1.0]], [[30.0], [1e6]]], dtype=np.float32)
    np.testing.assert_allclose(normalizer(vector)[:, :, 0], [[3, 1], [10, 10]])  # not yet
    normalizer.refresh()
    np.testing.assert_allclose(normalizer(vector)[:, :, 0], [[1, -1], [1, 10]], atol=2e-3)
    assert normalizer(vector).dtype == np.float32
    assert vector[1, 1, 0] == 1e6  # the input is left as it is


def test_observations_pass_when_it_is_switched_off():
    vector = np.full((1, 2, 3), 1e6, dtype=np.float32)
    assert ObservationNormalizer(1, 3, enabled=False)(vector) is vector


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    scaler = RewardScaler(1, 2, 0.5, enabled=True)
    reward = np.array([[[1.0, 4.0]], [[2.0, 0.0]], [[3.0, 8.0]]], dtype=np.float32)  # (T, R, E)
    done = np.array([[[False, True]], [[True, False]], [[False, False]]])
    scaled = scaler(reward, done)
    returns = [1, 4, 2.5, 0, 3, 8]
    np.testing.assert_allclose(scaled, reward / np.std(returns), rtol=1e-3)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaler.discounted, [[3, 8]])
    scaler(reward[:1], done[:1])  # carries on where the rollout ended
    np.testing.assert_allclose(scaler.discounted, [[2.5, 0]])
    returns += [2.5, 8]
    assert scaler.moments.variance[0] == pytest.approx(np.var(returns), rel=1e-3)


def test_rewards_are_scaled_per_run_and_clipped():
    scaler = RewardScaler(2, 1, 0.0, enabled=True)
    reward = np.zeros((400, 2, 1), dtype=np.float32)
    reward[::2, 0], reward[0, 1] = 2.0, 1e6
    scaled = scaler(reward, np.zeros(reward.shape, dtype=bool))
    np.testing.assert_allclose(scaled[::2, 0], 2, rtol=1e-3)  # deviation 1
    assert scaled[0, 1, 0] == 10


def test_rewards_pass_when_it_is_switched_off():
    reward = np.ones((3, 1, 2), dtype=np.float32)
    assert RewardScaler(1, 2, 0.9, enabled=False)(reward, reward > 2) is reward


def test_masked_samples_are_as_if_they_had_not_been_there():
    random = np.random.default_rng(0)
    samples, mask = random.normal(size=(2, 40, 3)), random.random((2, 40)) < 0.6
    samples[~mask] = np.nan
    together = RunningMoments(2, (3,))
    together.update(samples, mask)
    for run in range(2):
        alone = RunningMoments(1, (3,))
        alone.update(samples[run, mask[run]][None])
        for name, array in alone.state(0).items():
            np.testing.assert_allclose(together.state(run)[name], array, rtol=1e-12)
    before = together.state(0)
    together.update(samples, np.zeros_like(mask))
    np.testing.assert_array_equal(together.state(0)["mean"], before["mean"])
