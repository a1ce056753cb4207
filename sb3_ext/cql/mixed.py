"""A dataset and new transitions, mixed in every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.arguments import check_share
from sb3_ext.replay.batch import OfflineSamples, PrioritizedReplayBufferSamples, ReplayHooks, hooks_of, to_device
from sb3_ext.replay.dataset import ClippedRewards, PrioritizedOfflineReplayBuffer, lower_returns, scaled_returns
from sb3_ext.replay.prioritized import PrioritizedReplayBuffer


class OnlineReplayBuffer(ClippedRewards, PrioritizedReplayBuffer):
    """New transitions, and if asked for the discounted return from each on, once its episode has ended."""

    _returns_to_go: NDArray[np.float32] | None = None

    def keep_returns_to_go(self, wanted: bool) -> None:
        """Let batches hold ``returns_to_go`` from now on, or not; minus infinity where they are not known."""
        if not wanted:
            self._returns_to_go = None
        elif self._returns_to_go is None:
            self._returns_to_go = np.full((self.buffer_size, self.n_envs), -np.inf, np.float32)
            self._ages = np.zeros(self.n_envs, np.int64)

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """See :meth:`PrioritizedReplayBuffer.add`."""
        pos = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        if self._returns_to_go is None:
            return
        self._returns_to_go[pos] = -np.inf
        self._ages += 1
        for env in np.flatnonzero(done):
            steps = min(int(self._ages[env]), self.buffer_size)
            slots = (pos - np.arange(steps)[::-1]) % self.buffer_size
            rewards = self.rewards[slots, env]
            self._returns_to_go[slots, env] = lower_returns(
                np.clip(rewards, -1, 1) if self.clip_rewards else rewards,
                np.array([steps]),
                np.array([not infos[env].get("TimeLimit.truncated", False)]),
                self.gamma,
            )
            self._ages[env] = 0

    def end_sequences(self) -> None:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.end_sequences`."""
        super().end_sequences()
        if self._returns_to_go is not None:
            self._ages[:] = 0

    def _gather(
        self, indices: NDArray[np.int64], weights: NDArray[np.float32], env: VecNormalize | None
    ) -> PrioritizedReplayBufferSamples:
        samples = super()._gather(indices, weights, env)
        if self._returns_to_go is None:
            return samples
        returns = scaled_returns(self._returns_to_go.take(indices).reshape(-1, 1), env)
        return samples._replace(returns_to_go=to_device((returns,), self.device)[0])


class MixedReplayBuffer(ReplayBuffer, ReplayHooks):
    """
    Every batch holds a share of offline transitions; new transitions go to an online buffer.

    If the offline data is prioritized, so must the online buffer be, and each share is drawn by its own priorities.

    :param offline: the dataset
    :param online: where new transitions go
    :param offline_fraction: share of offline transitions per batch, from 0 to 1; everything is offline until ``online``
        has a transition
    """

    def __init__(self, offline: ReplayBuffer, online: ReplayBuffer, offline_fraction: float = 0.5) -> None:
        check_share(offline_fraction=offline_fraction)
        BaseBuffer.__init__(
            self, online.buffer_size, online.observation_space, online.action_space, online.device, online.n_envs
        )
        self.offline, self.online, self.offline_fraction = offline, online, offline_fraction
        self.optimize_memory_usage, self.handle_timeout_termination = False, True
        # indices from here on mean the online buffer; 0 if nothing is prioritized
        prioritized = isinstance(offline, (PrioritizedOfflineReplayBuffer, PrioritizedReplayBuffer))
        self._capacity = offline.priorities.tree.capacity if prioritized else 0  # type: ignore[attr-defined]
        self.pos, self.full = online.pos, online.full

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add to the online buffer; see SB3's ``ReplayBuffer.add``."""
        self.online.add(*args, **kwargs)
        self.pos, self.full = self.online.pos, self.online.full

    def reset(self) -> None:
        """Forget the online transitions."""
        self.online.reset()
        self.pos, self.full = 0, False

    def end_sequences(self) -> None:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.end_sequences`."""
        hooks_of(self.online).end_sequences()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw ``round(offline_fraction * batch_size)`` offline transitions, which come first, and the rest online."""
        online = self.online
        there = online.priorities.tree.total if isinstance(online, PrioritizedReplayBuffer) else online.size()
        n_offline = round(self.offline_fraction * batch_size) if there > 0 else batch_size
        parts = []
        if n_offline:
            parts.append(self.offline.sample(n_offline, env))
        if n_offline < batch_size:
            parts.append(online.sample(batch_size - n_offline, env))
            if self._capacity:
                parts[-1] = parts[-1]._replace(indices=parts[-1].indices + self._capacity)  # type: ignore[call-arg,attr-defined]
        kind = PrioritizedReplayBufferSamples if self._capacity else OfflineSamples
        columns = {name: _join(tuple(getattr(part, name, None) for part in parts)) for name in kind._fields}
        return kind(**columns)  # type: ignore[return-value]

    def weights(self, batch: Any) -> th.Tensor | None:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.weights`."""
        return batch.weights if self._capacity else None

    def update_priorities(self, indices: NDArray[np.int64], td_errors: NDArray[Any]) -> None:
        """Send errors where their transitions are."""
        old = indices < self._capacity
        hooks_of(self.offline).update_priorities(indices[old], td_errors[old])
        hooks_of(self.online).update_priorities(indices[~old] - self._capacity, td_errors[~old])

    def set_progress(self, remaining: float) -> None:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.set_progress`."""
        for buffer in (self.offline, self.online):
            hooks_of(buffer).set_progress(remaining)


def _join(column: tuple[Any, ...]) -> Any:
    """One field of all parts of a batch."""
    if len(column) == 1 or all(part is None for part in column):
        return column[0]
    if any(part is None for part in column):
        raise ValueError("One of the buffers gives n-step returns and the other does not; use the same n_steps.")
    if isinstance(column[0], dict):
        return {key: _join(tuple(part[key] for part in column)) for key in column[0]}
    if isinstance(column[0], np.ndarray):
        return np.concatenate(column)
    return th.cat([part.to(column[0].dtype) for part in column])
