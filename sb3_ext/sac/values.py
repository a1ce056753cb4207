"""The critics' values of many actions of each observation, without repeating the observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from torch import nn
from torch.nn import functional as F

_NEGLIGIBLE = 2.0**-23
"""Share of all gradients that may be left out: float32 rounds off as much."""
_WORTHWHILE = 0.8
"""Share of the rows from which on it is not worth copying them."""
_FUSED = hasattr(th.ops.mkldnn, "_linear_pointwise")
"""oneDNN multiplies large matrices faster than MKL does on many processors; PyTorch has no public name for it."""


def values_of_actions(critic: ContinuousCritic, observations: Any, actions: th.Tensor) -> th.Tensor:
    """
    Values of ``N`` actions for each of ``B`` observations, equal to ``critic(observation, action)`` up to rounding.

    Features are extracted, and multiplied by the first layer's weights, once for each observation. On a CPU the
    gradient of a network of ReLUs leaves out actions whose gradients are together less than what float32 rounds off:
    a softmax over values gives most actions none. With autocast, layers between the first and the last round.

    :param critic: SB3's critics, C of them
    :param observations: ``[B, ...]``, or a dictionary of those
    :param actions: scaled to [-1, 1], ``[B, N, D]``; no gradient flows into them
    :return: values, ``[C, B, N]``
    """
    with th.set_grad_enabled(th.is_grad_enabled() and not critic.share_features_extractor):
        features = critic.extract_features(observations, critic.features_extractor)
    values = []
    for network in critic.q_networks:
        layers = list(network.children())
        linears = layers[::2]
        plain = all(type(layer) is nn.Linear for layer in linears) and all(type(x) is nn.ReLU for x in layers[1::2])
        if plain and actions.device.type == "cpu" and len(linears) > 1 and not th.is_autocast_enabled("cpu"):
            parameters = [p for layer in linears for p in (layer.weight, layer.bias)]
            values.append(_ReluValues.apply(features, actions, *parameters))
            continue
        values.append(_by_layers(layers, features, actions))
    return th.stack(values)


def _by_layers(layers: list[nn.Module], features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """One network, layer by layer. Autocast is for those in the middle: observations and values keep their digits."""
    first, *inner = layers[:-1] or layers
    assert isinstance(first, nn.Linear)
    with th.autocast(actions.device.type, enabled=False):
        size = features.shape[1]
        hidden = F.linear(features, first.weight[:, :size], first.bias).unsqueeze(1)
        hidden = hidden + F.linear(actions, first.weight[:, size:])
    if len(layers) > 1:
        hidden = nn.Sequential(*inner)(hidden)
        with th.autocast(actions.device.type, enabled=False):
            hidden = layers[-1](hidden.to(first.weight.dtype))
    return hidden.squeeze(2)


def _linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, relu: bool) -> th.Tensor:
    """``x @ weight.T + bias``, and a ReLU after it."""
    if _FUSED and x.dtype == th.float32:
        found: th.Tensor = th.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
        return found
    found = F.linear(x, weight, bias)
    return found.relu_() if relu else found


def _through_relu(gradient: th.Tensor, output: th.Tensor) -> th.Tensor:
    """The gradient of what went into a ReLU, in place of that of its output."""
    found: th.Tensor = th.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)
    return found


class _ReluValues(th.autograd.Function):
    """One network: linear layers with a ReLU after each but the last, which has one output."""

    @staticmethod
    def forward(ctx: Any, features: th.Tensor, actions: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        n_obs, n_actions, dim = actions.shape
        weights, biases = parameters[::2], parameters[1::2]
        size = features.shape[1]
        flat = actions.reshape(-1, dim)
        # first layer: the observation's part once, and the action's on top of it
        base = th.addmm(biases[0], features, weights[0][:, :size].t())
        hidden = [base.repeat_interleave(n_actions, dim=0).addmm_(flat, weights[0][:, size:].t()).relu_()]
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            hidden.append(_linear(hidden[-1], weight, bias, relu=True))
        values = th.addmv(biases[-1], hidden[-1], weights[-1][0])
        ctx.save_for_backward(features, flat, *hidden, *weights)
        ctx.depth = len(hidden)
        return values.view(n_obs, n_actions)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor | None, ...]:
        features, flat, *saved = ctx.saved_tensors
        hidden: Sequence[th.Tensor] = saved[: ctx.depth]
        weights: Sequence[th.Tensor] = saved[ctx.depth :]
        (gradient,) = gradients
        n_obs, n_actions = gradient.shape
        gradient = gradient.reshape(-1)
        # rows that matter: all but those whose gradients add up to nothing
        size = gradient.abs()
        rows = (size > size.sum() * (_NEGLIGIBLE / len(size))).nonzero().squeeze(1)
        if len(rows) < _WORTHWHILE * len(size):
            gradient, flat = gradient[rows], flat[rows]
            hidden = [h[rows] for h in hidden]
            owner = rows // n_actions
        else:
            owner = None
        found: list[th.Tensor] = [gradient.sum().reshape(1), th.mv(hidden[-1].t(), gradient).reshape(1, -1)]
        # gradients of what goes into each ReLU, from the last one down
        there = th.outer(gradient, weights[-1][0])
        for below, here, weight in zip(hidden[-2::-1], hidden[:0:-1], weights[-2:0:-1], strict=True):
            there = _through_relu(there, here)
            found += [there.sum(dim=0), there.t() @ below]
            there = _linear(there, weight.t(), None, relu=False)
        there = _through_relu(there, hidden[0])
        # of the first layer; those of an observation's actions add up
        if owner is None:
            each = there.view(n_obs, n_actions, -1).sum(dim=1)
        else:
            each = there.new_zeros(n_obs, there.shape[1]).index_add_(0, owner, there)
        found += [each.sum(dim=0), th.cat([each.t() @ features, there.t() @ flat], dim=1)]
        into = each @ weights[0][:, : features.shape[1]] if ctx.needs_input_grad[0] else None
        return into, None, *found[::-1]
