"""Value prefixes: the sum of rewards since the root, instead of each reward alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

Memory = tuple[th.Tensor, th.Tensor]
"""Hidden and cell state of the LSTM, ``[B, hidden]`` each."""


class ValuePrefix(nn.Module):
    """
    Predict the undiscounted sum of rewards of the last steps with an LSTM over latent states (Ye et al., 2021,
    https://arxiv.org/abs/2111.00210, section 4.2).

    Every ``horizon`` steps from the root on, sum and memory begin anew.

    :param features: latent states ``[B, ...]`` -> ``[B, size]``
    :param size: features of the latent state
    :param hidden: units of the LSTM
    :param head: ``[B, hidden]`` -> ``[B, support_size]``
    :param horizon: steps per sum
    :raises ValueError: if the horizon is less than 1
    """

    def __init__(self, features: nn.Module, size: int, hidden: int, head: nn.Module, horizon: int) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"prefix_horizon must be at least 1, got {horizon}.")
        self.horizon = horizon
        self.features, self.lstm, self.head = features, nn.LSTMCell(size, hidden), head

    def start(self, rows: int) -> Memory:
        """Memory of roots: nothing."""
        zeros = self.lstm.weight_hh.new_zeros(rows, self.lstm.hidden_size)
        return zeros, zeros

    def forward(self, latent: th.Tensor, memory: Memory) -> tuple[th.Tensor, Memory]:
        """
        One step.

        :param latent: the state that the step leads to, ``[B, ...]``
        :param memory: before it
        :return: logits of the sum of rewards up to and with this step, ``[B, support_size]``, and the memory after it
        """
        hidden, cell = self.lstm(self.features(latent), memory)
        return self.head(hidden), (hidden, cell)


def start_parts(head: ValuePrefix, rows: int) -> tuple[th.Tensor, ...]:
    """
    What the search's embedding carries for value prefixes, at the root.

    :param head: the reward head
    :param rows: B
    :return: hidden and cell state ``[B, hidden]``, the sum so far ``[B]``, and the steps in it ``[B]``
    """
    hidden, cell = head.start(rows)
    return hidden, cell, hidden.new_zeros(rows), th.zeros(rows, dtype=th.int64, device=hidden.device)


def step_parts(
    reward: Callable[..., Any],
    decode: Callable[[th.Tensor], th.Tensor],
    latent: th.Tensor,
    parts: tuple[th.Tensor, ...],
    horizon: int,
) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
    """
    Reward of one step of the search: the difference of two sums.

    A child of a node in ``horizon``, ``2 horizon``, ... steps from the root begins with an empty memory and a sum of 0,
    so a reward is never counted twice, however deep the tree is.

    :param reward: latent states and memory -> logits and memory
    :param decode: logits -> sums of rewards
    :param latent: the state that the step leads to, ``[B, ...]``
    :param parts: of the node above, see :func:`start_parts`
    :param horizon: steps per sum
    :return: rewards ``[B]``, and the parts of the new node
    """
    hidden, cell, before, steps = parts
    logits, (hidden, cell) = reward(latent, (hidden, cell))
    total = decode(logits)
    steps = (steps + 1) % horizon
    goes_on = steps > 0
    kept = goes_on[:, None].to(hidden.dtype)
    return total - before, (hidden * kept, cell * kept, th.where(goes_on, total, 0.0), steps)
