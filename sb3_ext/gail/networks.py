"""A discriminator for pictures that knows where things are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch as th
from imitation.rewards.reward_nets import RewardNet
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from torch import nn


class NatureRewardNet(RewardNet):
    """
    The convolutions of Mnih et al. (2015) over the picture, then a layer over features and action.

    Unlike imitation's ``CnnRewardNet``, which averages over all places after two 3x3 convolutions and so cannot tell
    where in the picture something is, and unlike it for any kind of action.

    :param observation_space: of the agent, pictures channel first
    :param action_space: of the agent
    :param use_action: whether the discriminator sees actions
    :param features_extractor_class: convolutions to use instead
    :param features_extractor_kwargs: arguments for them
    :param hid_size: units of the layer over features and action
    """

    use_next_state = False

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        use_action: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        features_extractor_kwargs: dict[str, Any] | None = None,
        hid_size: int = 256,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.use_action = use_action
        self.features = features_extractor_class(observation_space, **(features_extractor_kwargs or {}))
        n_inputs = self.features.features_dim + (get_flattened_obs_dim(action_space) if use_action else 0)
        self.head = nn.Sequential(nn.Linear(n_inputs, hid_size), nn.ReLU(), nn.Linear(hid_size, 1))

    def forward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor, done: th.Tensor) -> th.Tensor:
        """
        Logit of each transition.

        :param state: pictures in [0, 1], ``[B, C, H, W]``
        :param action: one-hot or continuous, ``[B, ...]``
        :param next_state: not used
        :param done: not used
        :return: logits, ``[B]``
        """
        features = self.features(state)
        if self.use_action:
            features = th.cat([features, action.flatten(1)], dim=1)
        logits: th.Tensor = self.head(features)
        return logits.squeeze(1)
