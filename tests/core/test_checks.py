"""Each check lets the right through and names what is wrong."""

import pytest
import torch

from rgpo.core import checks


def test_same_shape_names_tensors_and_shapes_and_skips_none():
    x, y = torch.zeros(2, 3), torch.zeros(3)
    checks.require_same_shape(x=x, mask=None, z=x)
    with pytest.raises(ValueError, match=r"x \(2, 3\), y \(3,\)"):
        checks.require_same_shape(x=x, y=y)


def test_broadcast():
    checks.require_broadcast(x=torch.zeros(5, 1, 3), y=torch.zeros(3), z=torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"y \(2,\)"):
        checks.require_broadcast(x=torch.zeros(5, 3), y=torch.zeros(2))


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (5, 1)])
def test_broadcast_to_accepts(shape):
    checks.require_broadcast_to(torch.Size([5, 3]), gamma=torch.zeros(shape), lam=0.9)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (1, 1, 1)])
def test_broadcast_to_refuses_what_would_grow_or_not_fit(shape):
    with pytest.raises(ValueError, match="gamma must be a number or broadcast"):
        checks.require_broadcast_to(torch.Size([5, 3]), gamma=torch.zeros(shape))


def test_dtypes_are_named():
    real, flag, number = torch.zeros(2), torch.ones(2).bool(), torch.arange(2)
    checks.require_floating(x=real, y=None)
    checks.require_boolean(x=flag, y=None)
    checks.require_integer(x=number)
    for check, wrong in [
        (checks.require_floating, number),
        (checks.require_boolean, number),
        (checks.require_integer, real),
        (checks.require_integer, flag),
    ]:
        with pytest.raises(ValueError, match=r"culprit must be .* got torch\."):
            check(culprit=wrong)


def test_working_dtype_is_the_widest_and_float32_at_least():
    half, single, double = (
        torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert checks.working_dtype(half, half) == torch.float32
    assert checks.working_dtype(half, single) == torch.float32
    assert checks.working_dtype(half, double) == torch.float64
