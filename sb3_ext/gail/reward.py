"""Rewards of the discriminator: its network, what reward a logit makes, and what lies behind the end of a task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import torch as th
from imitation.rewards.reward_nets import BasicRewardNet, RewardNet
from imitation.util.networks import RunningNorm
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as add_spectral_norm

from sb3_ext.data.envs import is_frame_space


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
        """Logits, ``[B]``, of pictures in [0, 1], ``[B, C, H, W]``, and one-hot or continuous actions, ``[B, ...]``."""
        features = self.features(state)
        if self.use_action:
            features = th.cat([features, action.flatten(1)], dim=1)
        logits: th.Tensor = self.head(features)
        return logits.squeeze(1)


RewardForm: TypeAlias = Callable[[th.Tensor], th.Tensor]

REWARDS: dict[str, RewardForm] = {
    "-log(1-D)": F.softplus,
    "log(D)": F.logsigmoid,
    "D": th.sigmoid,
    "logit": lambda logits: logits,
    "airl": lambda logits: logits,
}
"""Reward of a logit l, where D = sigmoid(l) is the probability that the expert acted."""


def reward_form(reward: str | RewardForm) -> RewardForm:
    """Look a reward form up by its name; a function from logits ``[B]`` to rewards ``[B]`` is one."""
    if callable(reward):
        return reward
    if reward not in REWARDS:
        raise ValueError(f"There is no reward {reward!r}; choose one of {', '.join(map(repr, REWARDS))}.")
    return REWARDS[reward]


def make_reward_net(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    net_class: type[RewardNet] | None,
    net_kwargs: dict[str, Any],
    spectral_norm: bool,
) -> RewardNet:
    """
    Build the network behind the discriminator.

    :param net_class: a reward network of ``imitation``; default: :class:`NatureRewardNet` for pictures (channel
        first), else ``BasicRewardNet`` with ``RunningNorm`` on its input
    :param net_kwargs: further arguments for it
    :param spectral_norm: bound the Lipschitz constant of each layer by 1 (Miyato et al., 2018)
    """
    if net_class is None and is_frame_space(observation_space):
        net_class = NatureRewardNet
    elif net_class is None:
        net_class, net_kwargs = BasicRewardNet, {"normalize_input_layer": RunningNorm, **net_kwargs}
    net = net_class(observation_space, action_space, **net_kwargs)
    if spectral_norm:
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                add_spectral_norm(module)
    return net


LOGIT_CLIP = 5.0
"""Bound of the logits that carry an absorbing-state correction."""


class AbsorbingStates:
    """
    The value of a task's end, in closed form.

    An episode that ends is thought to go on for ever in an absorbing state (Kostrikov et al., 2019, section 4.2).
    Without it, a reward that is always positive pays for living on and one that is always negative for dying,
    whatever the expert does.

    Unlike the paper, no transition is added and no network is asked: all absorbing states are one point, and the best
    discriminator there is known. Let p_E and p_G be the shares of the absorbing state in expert's and generator's
    experience, each end counting for the gamma / (1 - gamma) steps that discounting sees. Then the logit of the
    absorbing state is log(p_E / p_G), and that of any other (s, a) is the network's plus log((1 - p_E) / (1 - p_G)),
    because the network compares distributions that are conditional on not being absorbed.

    Nor is a reward added at the end: subtracting the absorbing state's reward from every step's, for ever, changes
    no preference and leaves 0 for what lies behind the end, which is what PPO assumes. A bonus at the end would say the
    same, but drown the differences between steps in the value function's errors.

    Where the expert never ends, an end is as unlike it as can be, however rarely the agent ends. A smoothed
    log(p_E / p_G) would fade with the agent's last ends and leap back with the next one, by tens of rewards in every
    state's value; so the logit stays at its bound, where "-log(1-D)" takes next to nothing from the reward.

    :param n_expert: steps of the demonstrations
    :param n_expert_ends: how many of them ended the task
    """

    SMALLEST, MEMORY = 1e-3, 0.8

    def __init__(self, gamma: float, n_expert: int, n_expert_ends: int) -> None:
        if gamma >= 1:
            raise ValueError("Absorbing states need gamma < 1; pass absorbing=False for an undiscounted task.")
        self.steps_per_end = gamma / (1 - gamma)
        self.expert_share = self._share(n_expert, n_expert_ends)

    def _share(self, steps: int, ends: int) -> float:
        return self.steps_per_end * ends / (steps + self.steps_per_end * ends)

    def update(self, generator_share: float | None, steps: int, ends: int) -> float:
        """
        The generator's share, averaged over rollouts.

        :param generator_share: so far, None if there was no rollout
        :param steps: of the new rollout, whose weight is 1 - ``MEMORY``; ``ends`` of them ended the task
        """
        new = self._share(steps, ends)
        return new if generator_share is None else self.MEMORY * generator_share + (1 - self.MEMORY) * new

    def logits(self, generator_share: float) -> tuple[float, float]:
        """Logit of the absorbing state, within +-``LOGIT_CLIP``, and what to add to all others."""
        e = self.SMALLEST
        other = math.log((1 - self.expert_share + e) / (1 - generator_share + e))
        if self.expert_share == 0:
            return -LOGIT_CLIP, other
        absorbing = math.log((self.expert_share + e) / (generator_share + e))
        return max(-LOGIT_CLIP, min(LOGIT_CLIP, absorbing)), other
