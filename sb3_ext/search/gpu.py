"""Steps of the network for the search with everything on a GPU: the search itself sees row numbers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.search.gumbel import RecurrentOutput

Tensors = tuple[th.Tensor, ...]

_SPLIT = 512
"""From so many roots on there are two lanes."""


def padded(rows: int) -> int:
    """Size of the graph that serves so many roots, the next power of two or multiple of 256: few sizes serve all."""
    return 1 << (rows - 1).bit_length() if rows < 256 else -(-rows // 256) * 256


class DeviceSteps:
    """
    A :class:`~sb3_ext.search.gumbel.Lane` whose latent states stay on the GPU and whose network step is one CUDA graph.

    A step reads the states of the nodes it starts from, runs the network and stores the new states; to and from the
    GPU go one array of row numbers and one of rewards, values and logits. Images are kept with their channels last. On
    a CPU, where it gains nothing, a step runs as it is.

    :param step: slots ``[B]`` and the parts of an embedding ``[B, ...]`` -> numbers ``[B, 2 + A]``, new parts
    :param roots: B; fewer may be searched
    :param nodes: nodes per tree, without the root
    :param parts: of an embedding, as examples
    """

    rows: slice

    def __init__(self, step: Callable[..., Tensors], roots: int, nodes: int, parts: Tensors) -> None:
        self._step, self._size = step, roots
        device = parts[0].device
        self._pools = [
            th.zeros((roots * (nodes + 1), *_last(x).shape[1:]), dtype=x.dtype, device=device) for x in parts
        ]
        # rows to read from, slots, rows to write to
        graphed = device.type == "cuda"
        self._where = th.zeros(3, roots, dtype=th.int64, pin_memory=graphed)
        self._where_here: NDArray[np.int64] = self._where.numpy()
        self._where_there = th.zeros(3, roots, dtype=th.int64, device=device)
        self._graph: th.cuda.CUDAGraph | None = None
        self._numbers = self._run()
        if graphed:
            th.cuda.synchronize()
            self._graph = th.cuda.CUDAGraph()
            with th.cuda.graph(self._graph):
                self._numbers = self._run()
            self._done: Any = th.cuda.Event()  # type: ignore[no-untyped-call]
        self._found = th.empty(self._numbers.shape, pin_memory=graphed)
        self._found_here = self._found.numpy()
        self._roots = np.arange(roots)

    def start(self, parts: Tensors, rows: slice) -> None:
        """Begin a search, given the parts of the embedding of all roots and which of these the lane has."""
        self.rows, self._node, self._batch = rows, 0, rows.stop - rows.start
        if self._graph is not None:
            self._done.synchronize()  # a search that was given up may have left a step under way
        for pool, part in zip(self._pools, parts, strict=True):
            pool[: self._batch] = _last(part[rows])

    def launch(self, sources: NDArray[np.int64], actions: NDArray[np.int64]) -> None:
        """See :class:`~sb3_ext.search.gumbel.Lane`."""
        self._node += 1
        read, slots, write = self._where_here
        nodes, roots = np.divmod(sources, self._batch)
        read[: self._batch] = nodes * self._size + roots
        slots[: self._batch] = actions
        write[:] = self._roots + self._node * self._size
        self._where_there.copy_(self._where, non_blocking=True)
        if self._graph is None:
            self._numbers = self._run()
        else:
            self._graph.replay()
        self._found.copy_(self._numbers, non_blocking=True)
        if self._graph is not None:
            self._done.record()

    def collect(self) -> RecurrentOutput:
        """See :class:`~sb3_ext.search.gumbel.Lane`."""
        if self._graph is not None:
            self._done.synchronize()
        found = self._found_here[: self._batch]
        return RecurrentOutput(found[:, 0], found[:, 1], found[:, 2:], None)

    @th.no_grad()
    def _run(self) -> th.Tensor:
        source, slots, target = self._where_there
        numbers, *parts = self._step(slots, *(_first(pool.index_select(0, source)) for pool in self._pools))
        for pool, part in zip(self._pools, parts, strict=True):
            pool.index_copy_(0, target, _last(part))
        return numbers


class DeviceSearch:
    """Lanes for any number of roots; many get two: the GPU runs one half while the CPU steps the other's trees."""

    def __init__(self, step: Callable[..., Tensors]) -> None:
        self._step = step
        self.lanes: dict[tuple[int, int, int], DeviceSteps] = {}

    def start(self, parts: Tensors, nodes: int) -> list[DeviceSteps]:
        """Begin a search of so many simulations (``nodes``), given the parts of the embedding of all roots."""
        batch = len(parts[0])
        per_lane = -(-batch // 2) if batch >= _SPLIT else batch
        size = padded(per_lane)
        found: list[DeviceSteps] = []
        for first in range(0, batch, per_lane):
            key = size, nodes, len(found)
            if key not in self.lanes:
                self.lanes[key] = DeviceSteps(self._step, size, nodes, parts)
            self.lanes[key].start(parts, slice(first, min(first + per_lane, batch)))
            found.append(self.lanes[key])
        return found


def _last(x: th.Tensor) -> th.Tensor:
    """Pictures with channels last."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _first(x: Any) -> Any:
    """Undo :func:`_last`."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x
