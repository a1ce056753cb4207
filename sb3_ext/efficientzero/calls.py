"""What search and training call of a network: as it is, compiled, or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn


def _float(out: Any) -> Any:
    """Tensors of a nested tuple as float32."""
    if isinstance(out, tuple):
        return tuple(_float(part) for part in out)
    return out.float() if isinstance(out, th.Tensor) else out


class Calls:
    """
    The functions of a network. Results are float32 in any case, so that nothing else need know of ``bf16``.

    :param network: see :class:`~sb3_ext.efficientzero.networks.LatentNetwork`
    :param torch_compile: compile each of them; it is done at the first call
    :param bf16: run each of them in bfloat16 autocast
    """

    def __init__(self, network: Any, torch_compile: bool, bf16: bool) -> None:
        self._options = torch_compile, bf16
        self.represent = self._wrap(network.represent)
        self.dynamics = self._wrap(network.dynamics)
        self.predict = self._wrap(network.predict)
        self.reward = self._wrap(network.reward)
        self.projector = self._wrap(network.projector)
        self.predictor = self._wrap(network.predictor)

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch_compile, bf16 = self._options
        # a module's own compile() would change how it is saved
        function = function.forward if isinstance(function, nn.Module) and torch_compile else function
        function = th.compile(function) if torch_compile else function
        if not bf16:
            return function

        def call(first: th.Tensor, *rest: Any) -> Any:
            with th.autocast(first.device.type, th.bfloat16):
                out = function(first, *rest)
            return _float(out)

        return call
