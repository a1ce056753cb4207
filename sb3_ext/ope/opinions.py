"""What a trained model of Stable-Baselines3 does in a batch of states, and what it believes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.nn import functional as F

from sb3_ext.replay.batch import scaled


def _bounds(space: spaces.Box, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    low, high = (th.as_tensor(bound.reshape(-1), device=like.device) for bound in (space.low, space.high))
    return low, high


def action_vectors(space: spaces.Space[Any], actions: th.Tensor) -> th.Tensor:
    """
    Actions of the environment as vectors, ``[B, K]``, which critics and comparisons take.

    A discrete action is a distribution over all actions, with everything on this one: K is their number. Continuous
    actions are scaled to [-1, 1] if they are bounded, as SB3's critics see them. Others stay as they are.

    :param space: the action space
    :param actions: ``[B]``, ``[B, 1]`` or ``[B, *action_shape]``
    """
    if isinstance(space, spaces.Discrete):
        return F.one_hot(actions.long().reshape(-1), int(space.n)).float()
    actions = actions.flatten(1).float()
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        return actions
    found: th.Tensor = scaled(actions, *_bounds(space, actions))
    return found


def on_device(observations: Any, device: th.device) -> Any:
    """Observations, a tensor or a dictionary of them, on a device."""
    if isinstance(observations, dict):
        return {key: entry.to(device) for key, entry in observations.items()}
    return observations.to(device)


class Opinion:
    """
    What a model does and believes in a batch of states.

    Actions are vectors, see :func:`action_vectors`. What the network says is computed once.

    :param model: the trained model
    :param observations: as its policy sees them, ``[B, *obs_shape]``, on its device
    """

    has_values = False
    """Whether there is a Q(s, a)."""
    has_likelihood = False
    """Whether there is a probability, or a density, of every action."""

    def __init__(self, model: Any, observations: Any) -> None:
        self.model, self.observations = model, observations

    def actions(self, deterministic: bool = True) -> th.Tensor:
        """Actions of the policy, ``[B, K]``; for discrete ones their distribution where it is not deterministic."""
        raise NotImplementedError

    def values(self, actions: th.Tensor) -> th.Tensor:
        """Q(s, a), ``[B]``, of action vectors; an expectation where they are distributions. The mean over critics."""
        raise NotImplementedError

    def log_likelihood(self, actions: th.Tensor) -> th.Tensor:
        """``log pi(a | s)`` in nats, ``[B]``, of actions as the environment gets them."""
        raise NotImplementedError


class GreedyOpinion(Opinion):
    """Of DQN, QR-DQN and CQL: one value for each of the discrete actions."""

    has_values = True

    def __init__(self, model: Any, observations: Any) -> None:
        super().__init__(model, observations)
        found = (model.policy.quantile_net if hasattr(model.policy, "quantile_net") else model.policy.q_net)(
            observations
        )
        self.q_values: th.Tensor = found.mean(dim=1) if found.ndim == 3 else found  # [B, A], of quantiles their mean

    def actions(self, deterministic: bool = True) -> th.Tensor:
        """See :meth:`Opinion.actions`; the share ``exploration_rate`` is random where it is not deterministic."""
        n = self.q_values.shape[1]
        greedy = F.one_hot(self.q_values.argmax(dim=1), n).float()
        eps = 0.0 if deterministic else float(self.model.exploration_rate)
        return (1 - eps) * greedy + eps / n

    def values(self, actions: th.Tensor) -> th.Tensor:
        """See :meth:`Opinion.values`."""
        return (self.q_values * actions).sum(dim=1)


class DistributionOpinion(Opinion):
    """Of behaviour cloning, PPO and A2C: a distribution over actions, and no Q."""

    has_likelihood = True

    def __init__(self, model: Any, observations: Any) -> None:
        super().__init__(model, observations)
        self.distribution = model.policy.get_distribution(observations)

    def actions(self, deterministic: bool = True) -> th.Tensor:
        """See :meth:`Opinion.actions`."""
        space = self.model.action_space
        if isinstance(space, spaces.Discrete) and not deterministic:
            probabilities: th.Tensor = self.distribution.distribution.probs
            return probabilities
        actions = self.distribution.get_actions(deterministic=deterministic)
        if not isinstance(space, spaces.Box):
            return action_vectors(space, actions)
        if self.model.policy.squash_output:  # it is scaled already
            return actions.flatten(1)  # type: ignore[no-any-return]
        low, high = _bounds(space, actions)
        return action_vectors(space, actions.flatten(1).clamp(low, high))  # as predict() does

    def log_likelihood(self, actions: th.Tensor) -> th.Tensor:
        """See :meth:`Opinion.log_likelihood`."""
        space = self.model.action_space
        if isinstance(space, spaces.Discrete):
            actions = actions.long().reshape(-1)
        elif isinstance(space, spaces.Box):
            actions = action_vectors(space, actions) if self.model.policy.squash_output else actions.flatten(1)
        else:
            actions = actions.long() if isinstance(space, spaces.MultiDiscrete) else actions.float()
        found: th.Tensor = self.distribution.log_prob(actions)
        return found


class ActorOpinion(Opinion):
    """Of SAC, TD3 and their kin: an actor, and critics that take its scaled actions."""

    has_values = True

    def actions(self, deterministic: bool = True) -> th.Tensor:
        """See :meth:`Opinion.actions`."""
        actions: th.Tensor = self.model.policy._predict(self.observations, deterministic)
        return actions.flatten(1)

    def values(self, actions: th.Tensor) -> th.Tensor:
        """See :meth:`Opinion.values`."""
        found = self.model.critic(self.observations, actions)
        found = th.cat(found, dim=1) if isinstance(found, tuple) else found.flatten(1)  # TQC gives all its quantiles
        return found.mean(dim=1)


def opinion_of(model: Any) -> type[Opinion]:
    """
    Kind of opinion that a model has.

    :raises TypeError: if it is no model of SB3, or of a kind that cannot be asked
    """
    known = "DQN, QRDQN, CQL, BC, PPO, A2C, SAC, TD3 and classes derived from them"
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(f"A trained model is expected here ({known}), not {type(model).__name__}.")
    policy = model.policy
    if hasattr(policy, "quantile_net") or hasattr(policy, "q_net"):
        return GreedyOpinion
    if isinstance(policy, ActorCriticPolicy) and not hasattr(policy, "lstm_actor"):
        return DistributionOpinion
    if hasattr(policy, "actor") and hasattr(model, "critic"):
        return ActorOpinion
    raise TypeError(
        f"What {type(model).__name__} does in a state cannot be asked: its policy needs a memory, a search or masks. "
        f"Known are {known}; evaluate this one in its environment, with SB3's evaluate_policy."
    )


@contextmanager
def undisturbed(model: BaseAlgorithm) -> Iterator[None]:
    """
    Ask a model without leaving a trace: no gradients, networks in evaluation mode, all random streams as before.

    Dropout and the like are as they were afterwards.
    """
    modes = [(module, module.training) for module in model.policy.modules()]
    streams = random.getstate(), np.random.get_state(), th.get_rng_state()
    on_gpu = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    model.policy.set_training_mode(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        th.set_rng_state(streams[2])
        if on_gpu:
            th.cuda.set_rng_state_all(on_gpu)
