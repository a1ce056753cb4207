"""Statistics of ``VecNormalize`` where nothing has been played yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

_AT_ONCE = 1024


def begin_statistics(
    normalize: VecNormalize | None, observations: Callable[[NDArray[np.int64]], NDArray[Any]], count: int
) -> None:
    """
    Give a wrapper in training that has seen no observation yet the mean and variance of recorded ones.

    :param observations: the ``count`` recorded ones by number, ``[B] -> [B, *obs_shape]``
    """
    if normalize is None or not (normalize.norm_obs and normalize.training):
        return
    statistics = normalize.obs_rms
    if isinstance(statistics, RunningMeanStd) and statistics.count < 1:
        for first in range(0, count, _AT_ONCE):
            statistics.update(observations(np.arange(first, min(first + _AT_ONCE, count))))


def begin_statistics_of(normalize: VecNormalize | None, buffer: ReplayBuffer | None) -> None:
    """:func:`begin_statistics` with the observations of a replay buffer of SB3's kind, or of a dataset."""
    if buffer is not None:
        begin_statistics(normalize, lambda i: buffer._get_samples(i).observations.cpu().numpy(), buffer.size())
