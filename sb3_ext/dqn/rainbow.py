"""SB3's and sb3-contrib's policies with two small options of Rainbow: double Q-learning and a dueling head."""

from __future__ import annotations

from typing import Any

import sb3_contrib.qrdqn.policies as contrib
import stable_baselines3.dqn.policies as sb3
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn


class DuelingHead(nn.Module):
    """
    Dueling architecture (Wang et al., 2016, https://arxiv.org/abs/1511.06581, eq. 9): value plus centred advantages.

    Both streams have the hidden layers of ``net_arch``; plain Q values are one quantile.
    """

    def __init__(
        self, features_dim: int, n_actions: int, n_quantiles: int, net_arch: list[int], activation_fn: type[nn.Module]
    ) -> None:
        super().__init__()
        self._shape = (-1, n_quantiles, n_actions)
        self.value = nn.Sequential(*create_mlp(features_dim, n_quantiles, net_arch, activation_fn))
        self.advantage = nn.Sequential(*create_mlp(features_dim, n_quantiles * n_actions, net_arch, activation_fn))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Combine the streams: ``[B, features_dim]`` -> ``[B, N * A]``, quantiles before actions."""
        advantage = self.advantage(features).view(self._shape)
        values: th.Tensor = self.value(features).unsqueeze(2) + advantage - advantage.mean(dim=2, keepdim=True)
        return values.flatten(1)


class RainbowMixin(BasePolicy):
    """
    Two more arguments for ``policy_kwargs``; without them a policy is exactly the one it extends.

    :param double_q: double Q-learning (van Hasselt et al., 2016, https://arxiv.org/abs/1509.06461): the online network
        chooses the next action, the target network says its value; lowers overestimation
    :param dueling: :class:`DuelingHead`; helps where many actions are equally good
    """

    def __init__(self, *args: Any, double_q: bool = False, dueling: bool = False, **kwargs: Any) -> None:
        self.double_q, self.dueling = double_q, dueling
        super().__init__(*args, **kwargs)

    def _duel(self, net: Any) -> nn.Module:
        return DuelingHead(
            net.features_dim, int(net.action_space.n), getattr(net, "n_quantiles", 1), net.net_arch, net.activation_fn
        ).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "double_q": self.double_q, "dueling": self.dueling}


class DQNPolicy(RainbowMixin, sb3.DQNPolicy):
    """DQN's policy for vectors."""

    def make_q_net(self) -> sb3.QNetwork:
        """Build the network."""
        net = super().make_q_net()
        if self.dueling:
            net.q_net = self._duel(net)  # type: ignore[assignment]
        return net


class DQNCnnPolicy(DQNPolicy, sb3.CnnPolicy):
    """DQN's policy for images."""


class DQNMultiInputPolicy(DQNPolicy, sb3.MultiInputPolicy):
    """DQN's policy for ``Dict`` observations."""


class QRDQNPolicy(RainbowMixin, contrib.QRDQNPolicy):
    """QR-DQN's policy for vectors."""

    def make_quantile_net(self) -> contrib.QuantileNetwork:
        """Build the network."""
        net = super().make_quantile_net()
        if self.dueling:
            net.quantile_net = self._duel(net)  # type: ignore[assignment]
        return net


class QRDQNCnnPolicy(QRDQNPolicy, contrib.CnnPolicy):
    """QR-DQN's policy for images."""


class QRDQNMultiInputPolicy(QRDQNPolicy, contrib.MultiInputPolicy):
    """QR-DQN's policy for ``Dict`` observations."""
