"""Shape and dtype checks of the core: a programming error is named before anything is computed."""

from itertools import zip_longest

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given have one shape."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these tensors must have the same shape, got {told}")


def require_broadcast(**tensors: Tensor) -> None:
    """Raise ValueError unless the tensors broadcast to one shape."""
    for sizes in zip_longest(*(reversed(t.shape) for t in tensors.values()), fillvalue=1):
        if len(set(sizes) - {1}) > 1:
            told = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
            raise ValueError(f"these tensors must broadcast to one shape, got {told}")


def require_broadcast_to(shape: torch.Size, **tensors: Tensor | float) -> None:
    """Raise ValueError naming the first tensor that does not broadcast to `shape`."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            own = tensor.shape
            pairs = zip(reversed(own), reversed(shape), strict=False)
            if len(own) > len(shape) or any(size not in (1, wanted) for size, wanted in pairs):
                told = f"{tuple(own)} against {tuple(shape)}"
                raise ValueError(f"{name} must be a number or broadcast, got {told}")


def require_floating(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not of a floating dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def require_boolean(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not boolean."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be boolean (use .bool()), got {tensor.dtype}")


def require_integer(**tensors: Tensor) -> None:
    """Raise ValueError naming the first tensor that does not hold integers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be an integer tensor, got {tensor.dtype}")


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the inputs, and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
