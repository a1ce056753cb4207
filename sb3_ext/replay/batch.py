"""Batches: what the training loop gets from a replay buffer and tells it, n-step returns, and the one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch as th
from numpy.typing import NDArray

_ALIGN = 16
"""In a transfer every array begins at a multiple of so many bytes, so that it can be viewed in its dtype there."""


class PrioritizedReplayBufferSamples(NamedTuple):
    """SB3's samples with importance ``weights``, ``[B, 1]``, and the ``indices`` for ``update_priorities``, ``[B]``."""

    observations: Any
    actions: th.Tensor
    next_observations: Any
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    weights: th.Tensor
    indices: NDArray[np.int64]
    returns_to_go: th.Tensor | None = None


class OfflineSamples(NamedTuple):
    """SB3's samples with the discounted ``returns_to_go`` that the data got from there on, ``[B, 1]``, if asked for."""

    observations: Any
    actions: th.Tensor
    next_observations: Any
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None = None
    returns_to_go: th.Tensor | None = None


@runtime_checkable
class ReplayHooks(Protocol):
    """
    What the training loop asks and tells a replay buffer besides SB3's ``add`` and ``sample``.

    A buffer derives from this class and overrides what concerns it; by default nothing is weighted and nothing happens.
    """

    def weights(self, batch: Any) -> th.Tensor | None:
        """Importance weights of a batch, ``[B, 1]``; None: all samples count the same, and no errors are wanted."""
        return None

    def update_priorities(self, indices: NDArray[np.int64], td_errors: NDArray[Any]) -> None:
        """Learn from the errors of a batch, of any sign, ``[B]``, given its ``indices``."""
        return

    def set_progress(self, remaining: float) -> None:
        """Say how far the run is: which share of it is left, 1 to 0."""
        return

    def end_sequences(self) -> None:
        """Say that every environment begins anew: what comes next does not follow what was added last."""
        return


class _Foreign(ReplayHooks):
    """The hooks that a buffer of somebody else has."""

    def __init__(self, buffer: Any) -> None:
        for name in ("update_priorities", "set_progress", "end_sequences"):
            if callable(hook := getattr(buffer, name, None)):
                setattr(self, name, hook)

    def weights(self, batch: Any) -> th.Tensor | None:
        """See :meth:`ReplayHooks.weights`."""
        found: th.Tensor | None = getattr(batch, "weights", None)
        return found


def hooks_of(buffer: Any) -> ReplayHooks:
    """A buffer's hooks: it itself if it has them all; else those it has, the others doing nothing."""
    return buffer if isinstance(buffer, ReplayHooks) else _Foreign(buffer)


def n_step_returns(
    rewards: NDArray[np.floating[Any]], counts: NDArray[np.integer[Any]], gamma: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Discounted sums of the first rewards of each row, ``sum_{i < m} gamma^i r_i``, and ``gamma^m`` for what follows.

    Of the rewards ``[B, n]`` those of the row's sequence count, m from 0 to n, ``counts`` ``[B]``.
    """
    steps = np.arange(rewards.shape[1])
    weights = np.where(steps < counts[:, None], gamma**steps, 0)
    return (rewards * weights).sum(axis=1), np.asarray(gamma, np.float64) ** counts


def unscaled(actions: Any, low: Any, high: Any) -> Any:
    """Actions between their bounds from those that SB3's off-policy algorithms store, scaled to -1 to 1."""
    return low + 0.5 * (actions + 1) * (high - low)


def scaled(actions: Any, low: Any, high: Any) -> Any:
    """Undo :func:`unscaled`; actions between -1 and 1 stay what they are, bit for bit."""
    return actions if (low == -1).all() and (high == 1).all() else 2 * (actions - low) / (high - low) - 1


def fields_of(records: Any, dtype: np.dtype[Any]) -> dict[str, Any]:
    """
    Entries ``[..., *shape]`` of records: of an array ``[...]`` of that dtype, or of a tensor of bytes, ``[..., n]``.

    They are views. The dtype must be aligned.
    """
    if isinstance(records, np.ndarray):
        return {name: records[name] for name in dtype.names or ()}
    found = {}
    for name, (kind, start) in ((n, f[:2]) for n, f in (dtype.fields or {}).items()):
        there = records[..., start : start + kind.itemsize]
        found[name] = there.view(th.from_numpy(np.empty(0, kind.base)).dtype).unflatten(-1, kind.shape)
    return found


def _mapped(part: Any, function: Callable[[NDArray[Any]], Any]) -> Any:
    """Apply a function to an array, or to those of a dictionary; leave tensors and None alone."""
    if isinstance(part, dict):
        return {key: _mapped(array, function) for key, array in part.items()}
    return function(part) if isinstance(part, np.ndarray) else part


def to_device(parts: Sequence[Any], device: th.device) -> list[Any]:
    """
    Make tensors of arrays, and of dictionaries of arrays: without a copy on a CPU, in one transfer elsewhere.

    Tensors and None stay as they are.
    """
    if device.type == "cpu":
        return [_mapped(part, th.from_numpy) for part in parts]
    arrays: list[NDArray[Any]] = []
    for part in parts:
        _mapped(part, arrays.append)
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays)]).tolist()
    packed = np.empty(starts[-1], np.uint8)
    spans = [slice(start, start + array.nbytes) for start, array in zip(starts[:-1], arrays, strict=True)]
    for array, span in zip(arrays, spans, strict=True):
        packed[span].view(array.dtype).reshape(array.shape)[...] = array
    there = th.from_numpy(packed).to(device, non_blocking=True)
    dtypes = [th.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    tensors = (there[span].view(dtype).reshape(a.shape) for a, dtype, span in zip(arrays, dtypes, spans, strict=True))
    return [_mapped(part, lambda _: next(tensors)) for part in parts]
