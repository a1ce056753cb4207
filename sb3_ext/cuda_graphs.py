"""CUDA graphs: kernels are captured once and replayed together, so that a small network does not wait for Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.func import functional_call

from sb3_ext.losses import LossOutput

Tensors = tuple[th.Tensor, ...]

_SEEN = 2
"""Calls with the same shapes before they are graphed: libraries choose their kernels in the first ones."""

_MOST = 8
"""Graphs kept; shapes beyond that run as they are."""


class _Loss(nn.Module):
    """A loss as a module whose parameters it depends on; tensors in, tensors out."""

    def __init__(self, network: nn.Module, function: Callable[..., LossOutput]) -> None:
        super().__init__()
        self.network, self._function = network, function
        self.names: tuple[str, ...] = ()

    def forward(self, *inputs: th.Tensor) -> Tensors:
        output = self._function(*inputs)
        self.names = tuple(output.metrics)
        return output.loss, output.td_error.detach(), *(x.detach() for x in output.metrics.values())


class GraphedPass:
    """
    Forward and backward pass of a loss as two graphs.

    Autograd ties a parameter's gradient to the stream of the first pass that it saw, which must not be the one that is
    captured: so other tensors that share the parameters' memory stand in for them.
    """

    def __init__(self, loss: _Loss, parameters: dict[str, nn.Parameter], args: Tensors) -> None:
        self._parameters = list(parameters.values())
        self._inputs = tuple(x.clone() for x in args)
        stand_ins = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._forward, self._backward = th.cuda.CUDAGraph(), th.cuda.CUDAGraph()
        th.cuda.synchronize()
        with th.cuda.graph(self._forward):
            outputs = functional_call(loss, stand_ins, self._inputs)
        self._weights = th.empty_like(outputs[0])
        with th.cuda.graph(self._backward, pool=self._forward.pool()):
            found = th.autograd.grad(outputs[0], list(stand_ins.values()), self._weights, allow_unused=True)
            self._gradients = [
                g if g is None or g.stride() == p.stride() else th.empty_like(p).copy_(g)
                for p, g in zip(self._parameters, found, strict=True)
            ]
        self._outputs = tuple(x.detach() for x in outputs)

    def forward(self, args: Tensors) -> Tensors:
        """Loss, error and metrics."""
        for static, new in zip(self._inputs, args, strict=True):
            static.copy_(new)
        self._forward.replay()
        return self._outputs

    def backward(self, weights: th.Tensor | None) -> None:
        """See :class:`~sb3_ext.losses.LossOutput`."""
        if weights is None:
            self._weights.fill_(1 / len(self._weights))
        else:
            th.div(weights, len(weights), out=self._weights)
        self._backward.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


class GraphedLoss:
    """
    A loss whose forward and backward pass are CUDA graphs, one pair for each shape of its arguments.

    The results know their backward pass (:class:`~sb3_ext.losses.LossOutput`) and take no part in autograd.
    They and the gradients lie in memory that the next call writes to again. Parameters may change in place, as
    optimizers do; whatever else the function reads from Python, such as coefficients, is captured with it. On a CPU the
    function runs as it is. Nothing in it may depend on values that lie on the GPU.
    """

    def __init__(self, network: nn.Module, function: Callable[..., LossOutput]) -> None:
        self._loss = _Loss(network, function)
        self._parameters = {name: p for name, p in self._loss.named_parameters() if p.requires_grad}
        self._function = function
        self._seen: Counter[Any] = Counter()
        self.graphs: dict[Any, GraphedPass] = {}

    def __call__(self, *args: th.Tensor) -> LossOutput:
        """Replay, capture, or run the function as it is."""
        if not args[0].is_cuda:
            return self._function(*args)
        key = tuple((x.shape, x.dtype) for x in args)
        if key not in self.graphs:
            self._seen[key] += 1
            if self._seen[key] <= _SEEN or len(self.graphs) == _MOST:
                return self._function(*args)
            self.graphs[key] = GraphedPass(self._loss, self._parameters, args)
        graphed = self.graphs[key]
        loss, td_error, *metrics = graphed.forward(args)
        return LossOutput(loss, td_error, dict(zip(self._loss.names, metrics, strict=True)), graphed.backward)
