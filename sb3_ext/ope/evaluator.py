"""The network of fitted Q evaluation, as one of SB3's policies."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import QNetwork
from torch import nn


class FQEPolicy(BasePolicy):
    """
    Q(s, a) and its target, for vectors and everything else that can be flattened.

    It has no actions of its own. Networks are SB3's: ``QNetwork`` for discrete actions, ``ContinuousCritic`` for
    continuous ones.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate
    :param net_arch: units of the hidden layers; default: two of 256, none after a CNN of its own
    :param activation_fn: activation function
    :param features_extractor_class: as in SB3; default: what fits the observations
    :param features_extractor_kwargs: as in SB3
    :param normalize_images: as in SB3
    :param optimizer_class: as in SB3
    :param optimizer_kwargs: as in SB3
    """

    default_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_extractor,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        if net_arch is None:
            net_arch = [] if self.features_extractor_class is NatureCNN else [256, 256]
        self.net_arch, self.activation_fn = net_arch, activation_fn
        self.critic, self.critic_target = self._make_critic(), self._make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.optimizer = optimizer_class(
            self.critic.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _make_critic(self) -> QNetwork | ContinuousCritic:
        extractor = self.make_features_extractor()
        common: dict[str, Any] = {
            "observation_space": self.observation_space,
            "features_extractor": extractor,
            "features_dim": extractor.features_dim,
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
        }
        space = self.action_space
        if isinstance(space, spaces.Box):
            return ContinuousCritic(action_space=space, n_critics=1, share_features_extractor=False, **common)
        assert isinstance(space, spaces.Discrete)
        return QNetwork(action_space=space, **common)

    def values(self, observations: PyTorchObs, actions: th.Tensor, target: bool = False) -> th.Tensor:
        """
        Q(s, a), ``[B]``; an expectation where actions are distributions.

        :param observations: ``[B, *obs_shape]``
        :param actions: vectors, ``[B, K]``, see :func:`~sb3_ext.ope.opinions.action_vectors`
        :param target: ask the target network
        """
        network = self.critic_target if target else self.critic
        if isinstance(network, QNetwork):
            expected: th.Tensor = (network(observations) * actions).sum(dim=1)
            return expected
        found: th.Tensor = network(observations, actions)[0].squeeze(1)
        return found

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        raise NotImplementedError("FQE estimates what a policy is worth and has none: call predict() of that model.")

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data |= {
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "lr_schedule": self._dummy_schedule,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }
        return data


class FQECnnPolicy(FQEPolicy):
    """Q(s, a) for pictures: SB3's Nature CNN; parameters as in :class:`FQEPolicy`."""

    default_extractor = NatureCNN


class FQEMultiInputPolicy(FQEPolicy):
    """Q(s, a) for ``Dict`` observations; parameters as in :class:`FQEPolicy`."""

    default_extractor = CombinedExtractor
