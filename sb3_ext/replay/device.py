"""Frames on a device, so that a batch of image stacks never crosses the bus."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.replay.frames import FrameStore
from sb3_ext.replay.rings import RingStore

_CHUNK = 4096
"""Frames copied to a device at once."""


class DeviceFrames:
    """
    A :class:`~sb3_ext.replay.frames.FrameStore` on a device, with a frame of zeros in row ``blank``.

    Of records, which PyTorch does not know, it keeps and gives the bytes, ``[..., n]``.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: th.device) -> None:
        self.shape, self.dtype, self.blank = shape, dtype, count
        if dtype.names:
            shape, dtype = (dtype.itemsize,), np.dtype(np.uint8)
        self._frames = th.zeros((count + 1, *shape), dtype=th.from_numpy(np.empty(0, dtype)).dtype, device=device)

    @classmethod
    def copy_of(cls, frames: FrameStore, device: th.device) -> DeviceFrames:
        """Copy all frames of a store to a device."""
        copy = cls(len(frames), frames.shape, frames.dtype, device)
        for start in range(0, len(frames), _CHUNK):
            copy.write(start, frames.take(np.arange(start, min(start + _CHUNK, len(frames)))))
        return copy

    def __len__(self) -> int:
        return self.blank

    def write(self, row: int, frames: NDArray[Any]) -> None:
        """Copy neighbours in, ``[n, *shape]``, the first of them to ``row``."""
        if frames.dtype.names:
            frames = frames.view(np.uint8).reshape(len(frames), -1)
        self._frames[row : row + len(frames)] = th.from_numpy(frames)

    def take(self, rows: NDArray[np.int64]) -> th.Tensor:
        """See :meth:`~sb3_ext.replay.frames.FrameStore.take`."""
        return self._frames[th.from_numpy(rows).to(self._frames.device)]


class DeviceRings:
    """
    A copy of a ring store's frames on a device, brought up to date when windows are drawn.

    It takes as much memory there as the store has here: 0.7 GB for 100,000 frames of 84x84.
    """

    def __init__(self, store: RingStore, device: th.device) -> None:
        n_envs, n_rows, *shape = store.frames.shape
        self._store, self._copied = store, np.zeros(n_envs, np.int64)
        self._frames = DeviceFrames(n_envs * n_rows, tuple(shape), store.frames.dtype, device)

    def take_windows(self, indices: NDArray[np.int64], last: NDArray[np.int64]) -> th.Tensor:
        """See :meth:`~sb3_ext.replay.rings.RingStore.take_windows`; the result is on the device."""
        self._update()
        stacks = self._frames.take(self._store.window_rows(indices, last))  # [B, L + 1, k, C, ...]
        return stacks.flatten(2, 3)

    def _update(self) -> None:
        n_rows = self._store.frames.shape[1]
        for env, written in enumerate(self._store.written.tolist()):
            start = max(int(self._copied[env]), written - n_rows)
            while start < written:  # twice where the ring begins anew
                row = start % n_rows
                count = min(written - start, n_rows - row)
                self._frames.write(env * n_rows + row, self._store.frames[env, row : row + count])
                start += count
            self._copied[env] = written
