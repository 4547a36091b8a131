"""Memory for chunks of frames, used again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # these take a second to import, and a header can be read without them
    import numpy as np
    import torch


class Rooms:
    """Memory for chunks of frames: that of chunks which nobody holds any more comes first.

    The system clears memory that it gives out, which takes as long as filling it.
    """

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._arrays: list[np.ndarray] = []

    def take(self, count: int, is_packed: bool) -> torch.Tensor:
        """Return room for `count` frames, `(count, height, width, 3)`, not initialised.

        Args:
            count: Number of frames.
            is_packed: Whether the three colours of a pixel lie next to each other, or each frame in three planes.
        """
        import numpy as np
        import torch

        # A tensor refers to its array. How many references there are besides differs between versions of Python, so
        # they are counted in the same way for an array that nobody holds.
        idle = _reference_counts([np.empty(0)])[0]
        counts = _reference_counts(self._arrays)
        free = [array for array, n in zip(self._arrays, counts, strict=True) if len(array) == count and n <= idle]
        array = free[0] if free else np.empty((count, 3 * self._height * self._width), np.uint8)
        self._arrays = [*[other for other in self._arrays if other is not array][-1:], array]
        room = torch.from_numpy(array)
        if is_packed:
            return room.view(count, self._height, self._width, 3)
        return room.view(count, 3, self._height, self._width).permute(0, 2, 3, 1)


def _reference_counts(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]
