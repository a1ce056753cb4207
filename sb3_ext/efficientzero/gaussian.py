"""Policies for continuous actions: Gaussians squashed by tanh."""

from __future__ import annotations

import math

import torch as th
from torch.nn import functional as F

BOUND = 0.999
"""Largest absolute action, so that atanh stays finite."""


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
