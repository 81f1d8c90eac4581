import pytest
import torch

from rgpo.core.anchor import ParameterAverage


def test_average_is_the_weighted_mean_of_all_parameters():
    past = [torch.tensor([float(k), k**2], dtype=torch.float64) for k in range(6)]
    average = ParameterAverage(past[0], 0.7)
    for parameters in past[1:]:
        average.update(parameters)
    weights = torch.tensor([0.7 ** (5 - k) for k in range(6)], dtype=torch.float64)
    expected = (torch.stack(past) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(average.average, expected)


def test_several_steps_to_one_place_are_those_steps_one_by_one():
    start, end = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    decay = torch.tensor([[0.9], [0.5]])
    at_once, one_by_one = ParameterAverage(start, decay), ParameterAverage(start, decay)
    at_once.update(end, torch.tensor([[4.0], [4.0]]))
    for _ in range(4):
        one_by_one.update(end)
    torch.testing.assert_close(at_once.average, one_by_one.average)
    torch.testing.assert_close(at_once.weight, one_by_one.weight)


def test_no_decay_is_the_newest_and_no_step_changes_nothing():
    average = ParameterAverage(torch.zeros(2), 0.0)
    average.update(torch.ones(2))
    assert average.average.tolist() == [1, 1]
    average.update(torch.full((2,), 7.0), 0)
    assert average.average.tolist() == [1, 1]


def test_reset_state_and_refusal():
    average = ParameterAverage(torch.zeros(2, 1), torch.tensor([[0.9], [0.9]]))
    average.update(torch.ones(2, 1))
    copy = ParameterAverage(torch.zeros(2, 1), torch.tensor([[0.9], [0.9]]))
    copy.load_state_dict(average.state_dict())
    average.reset(torch.full((2, 1), 5.0), torch.tensor([[True], [False]]))
    assert average.average[0].item() == 5
    assert average.weight.tolist() == [[1.0], [pytest.approx(1.9)]]
    assert copy.average[0].item() == pytest.approx(1 / 1.9)
    with pytest.raises(ValueError, match="decay must lie in"):
        ParameterAverage(torch.zeros(1), 1.0)
