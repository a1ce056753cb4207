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
    """Mean, within [-5, 5], and standard deviation, at least 0.1, before the tanh: head ``[B, 2 D]`` -> ``[B, D]``."""
    mean, std = policy.chunk(2, dim=1)
    return 5 * th.tanh(mean / 5), F.softplus(std + 1.0) + 0.1


def log_prob(policy: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Log density ``[B, S]`` of actions ``[B, S, D]`` in (-1, 1) under the squashed Gaussian of a head ``[B, 2 D]``."""
    mean, std = squashed_normal(policy)
    actions = actions.clamp(-BOUND, BOUND)
    z = (th.atanh(actions) - mean[:, None]) / std[:, None]
    density = -0.5 * z**2 - std.log()[:, None] - 0.5 * math.log(2 * math.pi) - th.log1p(-(actions**2))
    return density.sum(-1)


def sampled_entropy(policy: th.Tensor, samples: int = 32) -> th.Tensor:
    """Entropy ``[B]``, in nats, of squashed Gaussians ``[B, 2 D]``, estimated from reparameterised samples."""
    mean, std = squashed_normal(policy)
    actions = th.tanh(mean[:, None] + std[:, None] * th.randn(len(mean), samples, mean.shape[1], device=mean.device))
    return -log_prob(policy, actions).mean(1)


def fixed_noise(samples: int, dimensions: int) -> th.Tensor:
    """Noise ``[S, D]`` that is the same in every call, for actions without chance: the first is the policy's mode."""
    noise = th.randn(samples, dimensions, generator=th.Generator().manual_seed(0))
    noise[0] = 0
    return noise


def root_samples(policy: th.Tensor, count: int, noise: bool) -> th.Tensor:
    """
    Actions ``[B, S, D]`` that roots with policies ``[B, 2 D]`` consider: with noise a quarter from the policy, the rest
    with three times its standard deviation; else all from the policy, with :func:`fixed_noise`.
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
    Actions ``[B, S, D]`` that nodes below the root consider, 0 behind the first :data:`INNER_ACTIONS` samples; ``noise
    [INNER_ACTIONS, D]`` is for every row, None draws for each.
    """
    mean, std = squashed_normal(policy)
    draw = th.randn(len(mean), INNER_ACTIONS, mean.shape[1], device=mean.device) if noise is None else noise
    actions = th.zeros(len(mean), slots, mean.shape[1], device=mean.device)
    actions[:, :INNER_ACTIONS] = th.tanh(mean[:, None] + std[:, None] * draw).clamp(-BOUND, BOUND)
    return actions
