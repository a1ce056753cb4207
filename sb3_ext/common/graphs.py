"""CUDA graphs: kernels are recorded once and replayed together, so that a small network does not wait for Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_ext.common.training import LossOutput

Tensors = tuple[th.Tensor, ...]
Key = tuple[Any, ...]

_SEEN = 2
"""Calls with the same shapes before they are recorded: what comes once is not worth it."""

_MOST = 8
"""Recordings kept; shapes beyond that run as they are."""


class _Recording(NamedTuple):
    graph: th.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


def _key(tensors: Tensors) -> Key:
    return tuple((tuple(x.shape), x.dtype) for x in tensors)


class Recorded:
    """
    A function of tensors that is recorded as a CUDA graph for each shape of its arguments, without gradients.

    Results lie in memory that the next call writes to again. Parameters may change in place between the calls.

    :param function: tensors -> tuple of tensors; nothing in it may depend on values on the CPU
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._recordings: dict[Key, _Recording] = {}
        self._seen: Counter[Key] = Counter()

    def __call__(self, *args: th.Tensor) -> Tensors:
        """Replay, record, or run the function as it is."""
        key = _key(args)
        recording = self._recordings.get(key)
        if recording is None:
            self._seen[key] += 1
            if not args[0].is_cuda or self._seen[key] <= _SEEN or len(self._recordings) == _MOST:
                return self._function(*args)
            recording = self._recordings[key] = self._record(args)
        for static, new in zip(recording.inputs, args, strict=True):
            static.copy_(new)
        recording.graph.replay()
        return recording.outputs

    @th.no_grad()
    def _record(self, args: Tensors) -> _Recording:
        inputs = tuple(x.clone() for x in args)
        th.cuda.synchronize()
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph):
            outputs = self._function(*inputs)
        return _Recording(graph, inputs, outputs)


class _Loss(nn.Module):
    """A loss as a module whose parameters it depends on; tensors in, tensors out."""

    def __init__(self, network: nn.Module, function: Callable[..., LossOutput]) -> None:
        super().__init__()
        self.network, self._function = network, function

    def forward(self, *inputs: th.Tensor) -> Tensors:
        output = self._function(*inputs)
        return output.loss, output.td_error.detach(), *(x.detach() for x in output.metrics.values())


class RecordedLoss:
    """
    A loss whose forward and backward pass are recorded as two CUDA graphs for each shape of its arguments.

    Results lie in memory that the next call writes to again. Parameters may change in place between the calls, as
    optimizers do; whatever else the function reads from Python, such as coefficients, is recorded with it.

    :param network: its parameters get the gradients, in training mode
    :param function: tensors -> :class:`~sb3_ext.common.training.LossOutput`; nothing in it may depend on values on the
        CPU
    """

    def __init__(self, network: nn.Module, function: Callable[..., LossOutput]) -> None:
        self._network, self._function = network, function
        self._recordings: dict[Key, Callable[..., Tensors]] = {}
        self._seen: Counter[Key] = Counter()
        self._names: tuple[str, ...] = ()

    def __call__(self, *args: th.Tensor) -> LossOutput:
        """Replay, record, or run the function as it is."""
        key = _key(args)
        if key not in self._recordings:
            self._seen[key] += 1
            if not args[0].is_cuda or self._seen[key] <= _SEEN or len(self._recordings) == _MOST:
                output = self._function(*args)
                self._names = tuple(output.metrics)
                return output
            self._recordings[key] = self._record(args)
        loss, td_error, *metrics = self._recordings[key](*args)
        return LossOutput(loss, td_error, dict(zip(self._names, metrics, strict=True)))

    def _record(self, args: Tensors) -> Callable[..., Tensors]:
        # the passes that warm up must leave no trace in running means
        kept = [(buffer, buffer.clone()) for buffer in self._network.buffers()]
        loss = _Loss(self._network, self._function)
        samples = tuple(x.clone() for x in args)
        recorded: Any = th.cuda.make_graphed_callables(loss, samples, allow_unused_input=True)
        with th.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        return recorded  # type: ignore[no-any-return]
