"""Policies for continuous actions: Gaussians squashed by tanh."""

from __future__ import annotations

import math

import torch as th
from torch.nn import functional as F

BOUND = 0.999
"""Largest absolute action, so that atanh stays finite."""

INNER_ACTIONS = 2
"""Sampled actions per node below the root."""


def squashed_normal(policy: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Gaussian before the tanh.

    :param policy: output of the policy head, ``[B, 2 D]``
    :return: mean, within [-5, 5], and standard deviation, at least 0.1, ``[B, D]``
    """
    mean, std = policy.chunk(2, dim=1)
    return 5 * th.tanh(mean / 5), F.softplus(std + 1.0) + 0.1


def log_prob(policy: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    Log density of actions under a Gaussian squashed by tanh.

    :param policy: output of the policy head, ``[B, 2 D]``
    :param actions: in (-1, 1), ``[B, S, D]``
    :return: ``[B, S]``
    """
    mean, std = squashed_normal(policy)
    actions = actions.clamp(-BOUND, BOUND)
    z = (th.atanh(actions) - mean[:, None]) / std[:, None]
    density = -0.5 * z**2 - std.log()[:, None] - 0.5 * math.log(2 * math.pi) - th.log1p(-(actions**2))
    return density.sum(-1)


def sampled_entropy(policy: th.Tensor, samples: int = 32) -> th.Tensor:
    """
    Entropy of a squashed Gaussian, estimated from reparameterised samples.

    :param policy: output of the policy head, ``[B, 2 D]``
    :param samples: how many
    :return: ``[B]``, in nats
    """
    mean, std = squashed_normal(policy)
    actions = th.tanh(mean[:, None] + std[:, None] * th.randn(len(mean), samples, mean.shape[1], device=mean.device))
    return -log_prob(policy, actions).mean(1)


def fixed_noise(samples: int, dimensions: int) -> th.Tensor:
    """
    Noise that is the same in every call, for actions without chance: the first sample is the policy's mode.

    :param samples: S
    :param dimensions: D
    :return: ``[S, D]``
    """
    noise = th.randn(samples, dimensions, generator=th.Generator().manual_seed(0))
    noise[0] = 0
    return noise


def root_samples(policy: th.Tensor, count: int, noise: bool) -> th.Tensor:
    """
    Actions that a root considers.

    :param policy: output of the policy head, ``[B, 2 D]``
    :param count: samples, S
    :param noise: a quarter from the policy, the rest with three times its standard deviation; else all from the policy,
        its mode first, with noise that is the same in every call
    :return: ``[B, S, D]``
    """
    mean, std = squashed_normal(policy)
    shape = (len(mean), count, mean.shape[1])
    if noise:
        draw = th.randn(shape, device=mean.device)
        draw[:, max(count // 4, 1) :] *= 3
    else:
        draw = fixed_noise(count, mean.shape[1]).to(mean.device).expand(shape)
    return th.tanh(mean[:, None] + std[:, None] * draw).clamp(-BOUND, BOUND)


def inner_samples(policy: th.Tensor, slots: int, noise: th.Tensor | None = None) -> th.Tensor:
    """
    Actions that a node below the root considers.

    :param policy: output of the policy head, ``[B, 2 D]``
    :param slots: places for samples, S
    :param noise: for every row, ``[INNER_ACTIONS, D]``; None draws for each
    :return: ``[B, S, D]``, 0 behind the first :data:`INNER_ACTIONS` samples
    """
    mean, std = squashed_normal(policy)
    draw = th.randn(len(mean), INNER_ACTIONS, mean.shape[1], device=mean.device) if noise is None else noise
    actions = th.zeros(len(mean), slots, mean.shape[1], device=mean.device)
    actions[:, :INNER_ACTIONS] = th.tanh(mean[:, None] + std[:, None] * draw).clamp(-BOUND, BOUND)
    return actions
