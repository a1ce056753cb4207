"""Steps of the network for the search with everything on a GPU: the search itself sees row numbers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.efficientzero.search import RecurrentOutput

Tensors = tuple[th.Tensor, ...]


def padded(rows: int) -> int:
    """
    Size of the recording that serves so many roots: few sizes serve all.

    :param rows: roots
    :return: the next power of two, or multiple of 256
    """
    return 1 << (rows - 1).bit_length() if rows < 256 else -(-rows // 256) * 256


class DeviceSteps:
    """
    Network steps over latent states that stay on the GPU, recorded as one CUDA graph.

    One step reads the states of the nodes it starts from, runs the network and stores the new states; to and from the
    GPU go one array of row numbers and one of rewards, values and logits. Images are kept with their channels last. On
    a CPU, where it gains nothing, a step runs as it is.

    :param step: slots ``[B]`` and the parts of an embedding ``[B, ...]`` -> numbers ``[B, 2 + A]``, new parts
    :param roots: B; fewer may be searched
    :param nodes: nodes per tree, without the root
    :param parts: of an embedding, as examples
    """

    def __init__(self, step: Callable[..., Tensors], roots: int, nodes: int, parts: Tensors) -> None:
        self._step, self._size = step, roots
        device = parts[0].device
        self._records = device.type == "cuda"
        self._pools = [
            th.zeros((roots * (nodes + 1), *_last(x).shape[1:]), dtype=x.dtype, device=device) for x in parts
        ]
        # rows to read from, slots, rows to write to
        self._where = th.zeros(3, roots, dtype=th.int64, pin_memory=self._records)
        self._where_here: NDArray[np.int64] = self._where.numpy()
        self._where_there = th.zeros(3, roots, dtype=th.int64, device=device)
        self._graph: th.cuda.CUDAGraph | None = None
        self._numbers = self._run()
        self._found = th.empty(self._numbers.shape, pin_memory=self._records)
        self._found_here = self._found.numpy()

    def start(self, parts: Tensors) -> NDArray[np.int64]:
        """
        Begin a search.

        :param parts: of the roots' embedding
        :return: what stands for it, ``[B]``
        """
        for pool, part in zip(self._pools, parts, strict=True):
            pool[: len(part)] = _last(part)
        self._node = 0
        return np.arange(len(parts[0]))

    def __call__(self, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> RecurrentOutput:
        """One step of the network from given nodes."""
        batch = len(rows)
        self._node += 1
        new = np.arange(self._size) + self._node * self._size
        self._where_here[0, :batch], self._where_here[1, :batch], self._where_here[2] = rows, slots, new
        self._where_there.copy_(self._where, non_blocking=True)
        if not self._records:
            self._numbers = self._run()
        elif self._graph is None:
            self._graph = th.cuda.CUDAGraph()
            th.cuda.synchronize()
            with th.cuda.graph(self._graph):
                self._numbers = self._run()
        if self._graph is not None:
            self._graph.replay()
        self._found.copy_(self._numbers, non_blocking=True)
        if self._records:
            th.cuda.current_stream().synchronize()
        found = self._found_here[:batch].copy()
        return RecurrentOutput(found[:, 0], found[:, 1], found[:, 2:], new[:batch])

    @th.no_grad()
    def _run(self) -> th.Tensor:
        source, slots, target = self._where_there
        numbers, *parts = self._step(slots, *(_first(pool.index_select(0, source)) for pool in self._pools))
        for pool, part in zip(self._pools, parts, strict=True):
            pool.index_copy_(0, target, _last(part))
        return numbers


def _last(x: th.Tensor) -> th.Tensor:
    """Pictures with channels last."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _first(x: Any) -> Any:
    """Undo :func:`_last`."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x
