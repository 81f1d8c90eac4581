"""Batches that are learnt from an exact number of updates after they were generated."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rgpo.errors import RgpoError

Batch = dict[str, Any]


class Lag:
    """A queue of generated batches: every one comes out `updates` exchanges after it went in.

    Each batch carries its own log-probs, advantages and token count, so that nothing about it
    depends on when it is used.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.queue: deque[Batch] = deque()

    def exchange(self, batch: Batch, more: Callable[[], Batch]) -> Batch:
        """Put the newest batch in and take the one out whose turn it is.

        `more` generates another batch. It is called before the first update only: the updates
        1 to K have no policy K updates older, they learn from further batches of the initial one.
        """
        self.queue.append(batch)
        while len(self.queue) <= self.updates:
            self.queue.append(more())
        return self.queue.popleft()

    def restore(self, queue: Sequence[Batch]) -> None:
        """Continue with the batches of a checkpoint; RgpoError if it had another lag."""
        if len(queue) != self.updates:
            raise RgpoError(
                f"the checkpoint has a lag of {len(queue)} updates and this run one of "
                f"{self.updates}: resume with lag={len(queue)}"
            )
        self.queue = deque(queue)
