"""Where tensors live."""

import torch

from rgpo.errors import RgpoError


def usable_device(name: str) -> torch.device:
    """The device of that name; RgpoError if PyTorch cannot put a tensor on it here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sentence = str(error).splitlines()[0]
        raise RgpoError(f"device {name!r} cannot be used here ({sentence}): use cpu") from error
    return device
