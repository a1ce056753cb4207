"""Targets of EfficientZero V2 from windows of experience: numpy only, no network, no buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sb3_ext.replay.batch import n_step_returns

Floats = NDArray[np.floating[Any]]


def n_step_values(
    rewards: Floats,
    values: Floats,
    lengths: NDArray[np.int64],
    terminated: NDArray[np.bool_],
    *,
    unroll_steps: int,
    n_steps: int,
    gamma: float,
) -> NDArray[np.float32]:
    """
    n-step returns ``[B, K + 1]`` at the first ``K + 1`` places of each window, bootstrapped from given values.

    ``z_k = sum_{i < m} gamma^i r_{k + i} + gamma^m v_{k + m}`` with ``m = min(n, length - k)``: where a window ends
    early, the sum stops and bootstraps there; behind a termination there is nothing, and the value of a terminal place
    is 0. Places beyond the end of a window that was not terminated get the value of its last observation, which is to
    be masked.

    :param rewards: ``[B, L]``, ``L >= K + n``; ignored from ``lengths`` on
    :param values: of the window's observations, ``[B, L + 1]``; ignored beyond ``lengths``
    :param lengths: transitions of the window that belong to its episode, ``[B]``, from 1 to L
    :param terminated: whether the last of them ended the task, ``[B]``
    :raises ValueError: if the windows are too short
    """
    batch, length = rewards.shape
    if length < unroll_steps + n_steps or values.shape != (batch, length + 1):
        raise ValueError(
            f"Rewards {rewards.shape} and values {values.shape} are no windows for {unroll_steps} unroll steps and "
            f"{n_steps}-step returns."
        )
    steps = np.arange(length)
    rewards = np.where(steps < lengths[:, None], rewards, 0.0)  # whatever lies there, NaN too
    ends = np.minimum(np.arange(length + 1)[None], lengths[:, None])
    values = np.take_along_axis(np.asarray(values, np.float64), ends, axis=1)
    values[terminated[:, None] & (np.arange(length + 1) >= lengths[:, None])] = 0.0
    places = np.arange(unroll_steps + 1)
    counts = np.clip(lengths[:, None] - places, 0, n_steps)
    windows = sliding_window_view(rewards, n_steps, axis=1)[:, : unroll_steps + 1]  # [B, K + 1, n]
    sums, discounts = n_step_returns(windows.reshape(-1, n_steps), counts.reshape(-1), gamma)
    bootstraps = np.take_along_axis(values, places + counts, axis=1)
    return (sums + discounts * bootstraps.reshape(-1)).reshape(batch, -1).astype(np.float32)


def mix_values(n_step: Floats, search: Floats, fresh: NDArray[np.bool_]) -> NDArray[np.float32]:
    """
    Mixed value target ``[B, K + 1]``: n-step returns for fresh windows ``[B]``, whose actions are nearly on-policy, and
    search-based values for the others (Wang et al., 2024, https://arxiv.org/abs/2403.00564).
    """
    return np.where(fresh[:, None], n_step, search).astype(np.float32)


def loss_masks(
    lengths: NDArray[np.int64], terminated: NDArray[np.bool_], unroll_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """
    Which places of a window each loss may see, 0 or 1, from what :func:`n_step_values` gets. ``policy [B, K + 1]``:
    observations in which an action is to be chosen. ``value [B, K + 1]``: those, and everything behind a termination,
    where the value is 0. ``reward [B, K]``: transitions of the episode, and those behind a termination, where it is 0.
    """
    places = np.arange(unroll_steps + 1)
    inside = places <= lengths[:, None]
    policy = inside & ~(terminated[:, None] & (places == lengths[:, None]))
    value = inside | terminated[:, None]
    reward = (places[:-1] < lengths[:, None]) | terminated[:, None]
    return policy.astype(np.float32), value.astype(np.float32), reward.astype(np.float32)


def value_prefixes(rewards: Floats, horizon: int) -> NDArray[np.float32]:
    """
    Undiscounted sums of rewards ``[B, K]`` from the root on, which begin anew every ``horizon`` steps (Ye et al., 2021,
    https://arxiv.org/abs/2111.00210, section 4.2).
    """
    parts = [rewards[:, k : k + horizon].cumsum(axis=1) for k in range(0, rewards.shape[1], horizon)]
    return np.concatenate(parts, axis=1).astype(np.float32)
