"""A fixed dataset of transitions as a replay buffer, with frames stored once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.replay.batch import (
    OfflineSamples,
    PrioritizedReplayBufferSamples,
    ReplayHooks,
    fields_of,
    n_step_returns,
    scaled,
    to_device,
)
from sb3_ext.replay.frames import FrameStore, check_padding_type, gather_stacks
from sb3_ext.replay.priorities import Priorities


def discounted_returns(
    rewards: NDArray[np.float32], remaining: NDArray[np.integer[Any]], gamma: float
) -> NDArray[np.float64]:
    """
    Discounted return ``[N]`` from every step of all episodes; ``remaining`` steps of each are left, with this one.

    Doubles the horizon in each pass: ``G_2m(t) = G_m(t) + gamma^m G_m(t + m)``, so 27,000 steps take 15 passes.
    """
    returns = rewards.astype(np.float64)
    span = 1
    while span < remaining.max(initial=0):
        later = np.flatnonzero(remaining > span)
        returns[later] += gamma**span * returns[later + span]
        span *= 2
    return returns


def _bounded_returns(
    rewards: NDArray[np.float32],
    lengths: NDArray[np.int64],
    terminated: NDArray[np.bool_],
    gamma: float,
    bound: np.ufunc,
) -> NDArray[np.float64]:
    """
    Discounted returns ``[N]`` where a cut episode goes on for ever with its mean reward, or 0, whichever is the bound.

    :param bound: ``np.maximum`` or ``np.minimum``
    """
    ends = np.cumsum(lengths)
    remaining = np.repeat(ends, lengths) - np.arange(len(rewards))
    mean = np.add.reduceat(rewards.astype(np.float64), ends - lengths) / lengths
    beyond = np.where(terminated, 0, bound(mean, 0)) / max(1 - gamma, 1e-6)
    returns: NDArray[np.float64] = discounted_returns(rewards, remaining, gamma)
    return returns + gamma ** remaining.astype(np.float64) * np.repeat(beyond, lengths)


def lower_returns(
    rewards: NDArray[np.float32], lengths: NDArray[np.int64], terminated: NDArray[np.bool_], gamma: float
) -> NDArray[np.float32]:
    """
    Discounted return from every step of all episodes, ``[N]``, as a lower bound of its value.

    Unlike in Cal-QL's paper, an episode that was cut goes on with its mean reward where that is negative: otherwise
    the return would rise towards the cut. Where it is positive, nothing is added.

    :param rewards: of all episodes, one after the other, ``[N]``
    :param lengths: steps of each, ``[n_episodes]``
    :param terminated: whether it ended by itself, ``[n_episodes]``
    """
    return _bounded_returns(rewards, lengths, terminated, gamma, np.minimum).astype(np.float32)


def scaled_returns(returns: NDArray[np.float32], env: VecNormalize | None) -> NDArray[np.float32]:
    """Returns in the units of the rewards that ``VecNormalize`` gives now, which it divides by a number."""
    if env is None or not env.norm_reward:
        return returns
    return (returns / np.sqrt(env.ret_rms.var + env.epsilon)).astype(np.float32)


class ClippedRewards(ReplayBuffer):
    """Where ``clip_rewards`` is set, each reward is clipped to [-1, 1], before n of them are summed."""

    clip_rewards = False

    def _normalize_reward(  # type: ignore[override]
        self, reward: NDArray[Any], env: VecNormalize | None = None
    ) -> NDArray[Any]:
        reward = super()._normalize_reward(reward, env)
        return np.clip(reward, -1, 1) if self.clip_rewards else reward


class OfflineReplayBuffer(ClippedRewards, ReplayHooks):
    """
    A fixed set of episodes as an SB3 replay buffer.

    Rows are frames: an episode of T steps takes T + 1 rows, the last one being its final observation. Observation
    stacks are rebuilt when a batch is drawn. ``dones`` is 1 for terminations only, so truncated episodes bootstrap.
    Where the attribute ``clip_rewards`` is set, each reward is clipped to [-1, 1] before n of them are summed. Where
    ``scale_actions`` is set, batches hold actions scaled from their bounds to [-1, 1].

    :param frames: the frames, channel first, ``[N, C, ...]``; for ``Dict`` observations records, ``[N]``, whose fields
        are their entries, see :class:`~sb3_ext.replay.frames.FrameStore`
    :param actions: action taken at each row, ``[N]``, or ``[N, *action_shape]`` as the environment got it; ignored at
        the last row of an episode
    :param rewards: reward received, ``[N]``; likewise
    :param terminated: whether that step ended the task, ``[N]``
    :param lengths: steps of each episode, ``[n_episodes]``; ``sum(lengths + 1) == N``
    :param observation_space: space of the stacks the agent sees, of ``frame_stack`` frames each
    :param padding_type: what stands before an episode's first frame: ``"zero"``, or ``"reset"`` for that frame again
    :param n_steps: sum this many rewards, discounted by ``gamma``, before bootstrapping
    :param seed: seed of the sampler, which has its own generator so that evaluation does not disturb training
    :raises ValueError: if the arrays do not fit together, there is no transition, or ``padding_type`` is none
    """

    def __init__(
        self,
        frames: FrameStore,
        actions: NDArray[Any],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        frame_stack: int = 1,
        padding_type: str = "zero",
        n_steps: int = 1,
        gamma: float = 0.99,
        device: th.device | str = "auto",
        seed: int | None = None,
    ) -> None:
        lengths = np.asarray(lengths, np.int64)
        n_rows, n_transitions = int((lengths + 1).sum()), int(lengths.sum())
        if not len(frames) == len(actions) == len(rewards) == len(terminated) == n_rows:
            raise ValueError(
                f"{len(frames)} frames, {len(actions)} actions, {len(rewards)} rewards, {len(terminated)} termination "
                f"flags do not fit episodes of {n_rows} rows in all (steps + 1 each)."
            )
        if n_transitions == 0:
            raise ValueError("The dataset has no transition.")
        if lengths.min() < 1:
            raise ValueError(f"Episode {int(lengths.argmin())} has {lengths.min()} steps; every episode needs one.")
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
        # not ReplayBuffer.__init__: it would allocate arrays for stacked observations
        BaseBuffer.__init__(self, n_transitions, observation_space, action_space, device)
        self.frames, self.rewards, self.terminated = frames, rewards, terminated
        self.actions, self.lengths = actions, lengths
        self.frame_stack, self.padding_type = frame_stack, check_padding_type(padding_type)
        self.n_steps, self.gamma = n_steps, gamma
        self.optimize_memory_usage, self.handle_timeout_termination = True, True
        self.pos, self.full = 0, True
        starts = np.cumsum(lengths + 1) - (lengths + 1)
        dtype = np.int32 if n_rows < 2**31 else np.int64
        self._age = (np.arange(n_rows) - np.repeat(starts, lengths + 1)).astype(np.int32)
        self._left = (np.repeat(lengths, lengths + 1) - self._age).astype(np.int32)
        self._rows = np.flatnonzero(self._left).astype(dtype)
        self._action_dtype = np.float32 if isinstance(action_space, spaces.Box) else np.int64
        self.rng = np.random.default_rng(seed)
        self.info: dict[str, Any] = {}
        self.scale_actions = False
        self._returns_to_go: NDArray[np.float32] | None = None

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    def seed(self, seed: int | None) -> None:
        """Restart the sampler; None takes fresh entropy."""
        self.rng = np.random.default_rng(seed)

    @property
    def sampler_state(self) -> Any:
        """Where the sampler stands, to go on from there with the same data."""
        return {**self.rng.bit_generator.state, "items": self.buffer_size}

    @sampler_state.setter
    def sampler_state(self, state: Any) -> None:
        self.rng.bit_generator.state = state

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the dataset is fixed."""
        raise TypeError("An offline dataset is fixed; to add transitions, fine-tune with learn_online().")

    def reset(self) -> None:
        """Refuse: the dataset is fixed."""
        raise TypeError("An offline dataset is fixed and cannot be reset.")

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw transitions uniformly with replacement; observations have the dtype they are stored in."""
        indices = self.rng.integers(0, self.buffer_size, size=batch_size)
        samples = self._get_samples(indices, env)
        if self._returns_to_go is None:
            return samples
        return OfflineSamples(*samples, self._to_go(indices, env))  # type: ignore[return-value]

    def _get_samples(self, batch_inds: NDArray[np.int64], env: VecNormalize | None = None) -> ReplayBufferSamples:
        rows = self._rows[batch_inds].astype(np.int64)
        last, rewards, discounts = self._n_step(rows, env)
        observations, next_observations = self._stacks(rows)
        if last is not rows:
            next_observations = self._stacks(last)[1]
        observations, next_observations, actions, dones, rewards, discounts = to_device(
            (
                self._normalized(observations, env),
                self._normalized(next_observations, env),
                self._actions(rows),
                self.terminated[last].astype(np.float32).reshape(-1, 1),
                rewards.reshape(-1, 1),
                None if discounts is None else discounts.reshape(-1, 1),
            ),
            self.device,
        )
        return ReplayBufferSamples(observations, actions, next_observations, dones, rewards, discounts)

    def _actions(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        actions = self.actions[rows].astype(self._action_dtype)
        if self.scale_actions:
            assert isinstance(self.action_space, spaces.Box)
            actions = scaled(actions, self.action_space.low, self.action_space.high).astype(self._action_dtype)
        return actions.reshape(len(rows), -1)

    def _to_go(self, indices: NDArray[np.int64], env: VecNormalize | None) -> th.Tensor | None:
        if self._returns_to_go is None:
            return None
        there = scaled_returns(self._returns_to_go[indices].reshape(-1, 1), env)
        return to_device((there,), self.device)[0]  # type: ignore[no-any-return]

    def keep_returns_to_go(self, wanted: bool) -> None:
        """
        Let batches hold ``returns_to_go`` from now on, or not.

        They are those of :func:`lower_returns`.
        """
        if not wanted:
            self._returns_to_go = None
            return
        rewards = self.rewards[self._rows]
        rewards = np.clip(rewards, -1, 1) if self.clip_rewards else rewards
        self._returns_to_go = lower_returns(rewards, self.lengths, self._terminated(), self.gamma)

    def _stacks(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        if self.frames.dtype.names:
            entries = fields_of(self.frames.take(rows[:, None] + np.arange(2)), self.frames.dtype)
            return {k: x[:, 0] for k, x in entries.items()}, {k: x[:, 1] for k, x in entries.items()}
        age = self._age[rows].astype(np.int64)
        return gather_stacks(self.frames, rows, age, self.frame_stack, self.padding_type)

    def _normalized(self, observations: Any, env: VecNormalize | None) -> Any:
        if env is None:
            return observations
        if isinstance(observations, dict):
            observations = {k: x.cpu().numpy() if isinstance(x, th.Tensor) else x for k, x in observations.items()}
        elif isinstance(observations, th.Tensor):
            observations = observations.cpu().numpy()
        return self._normalize_obs(observations, env)

    def _n_step(
        self, rows: NDArray[np.int64], env: VecNormalize | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
        """Last row, summed reward and discount of the n-step return; the sum stops with the episode."""
        if self.n_steps == 1:
            return rows, self._normalize_reward(self.rewards[rows].astype(np.float32), env), None
        count = np.minimum(self.n_steps, self._left[rows])
        window = rows[:, None] + np.minimum(np.arange(self.n_steps), count[:, None] - 1)
        rewards, discounts = n_step_returns(self._normalize_reward(self.rewards[window], env), count, self.gamma)
        return rows + count - 1, rewards.astype(np.float32), discounts.astype(np.float32)

    def discounted_returns(self, gamma: float, rewards: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """Discounted return from each transition, ``[n_transitions]``; ``rewards``, ``[N]``, instead of the stored."""
        per_row = discounted_returns(self.rewards if rewards is None else rewards, self._left, gamma)
        returns: NDArray[np.float64] = per_row[self._rows]
        return returns

    def largest_return(self, gamma: float, rewards: NDArray[np.float32] | None = None) -> float:
        """Largest discounted return; a truncated episode counts as if it had gone on with its mean reward."""
        rewards = (self.rewards if rewards is None else rewards)[self._rows]
        return float(_bounded_returns(rewards, self.lengths, self._terminated(), gamma, np.maximum).max())

    def _terminated(self) -> NDArray[np.bool_]:
        """Whether each episode ended by itself, ``[n_episodes]``."""
        found: NDArray[np.bool_] = self.terminated[self._rows[np.cumsum(self.lengths) - 1]]
        return found

    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, ``[n_episodes]``."""
        starts = np.cumsum(self.lengths) - self.lengths
        returns: NDArray[np.float64] = np.add.reduceat(self.rewards[self._rows].astype(np.float64), starts)
        return returns

    def action_counts(self) -> NDArray[np.int64]:
        """How often each action was taken, ``[A]``."""
        assert isinstance(self.action_space, spaces.Discrete)
        return np.bincount(self.actions[self._rows], minlength=int(self.action_space.n))


class PrioritizedOfflineReplayBuffer(OfflineReplayBuffer):
    """
    A fixed dataset, drawn from by priority; made by ``load_minari(..., prioritized=...)``.

    :param prioritized: arguments of :class:`~sb3_ext.replay.priorities.Priorities`
    """

    def __init__(self, *args: Any, prioritized: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.priorities = Priorities(self.buffer_size, **{"seed": kwargs.get("seed"), **prioritized})
        self.priorities.activate_range(0, self.buffer_size)

    def seed(self, seed: int | None) -> None:
        """See :meth:`OfflineReplayBuffer.seed`."""
        self.priorities.rng = np.random.default_rng(seed)

    @property
    def sampler_state(self) -> Any:
        """The priorities."""
        return self.priorities

    @sampler_state.setter
    def sampler_state(self, state: Any) -> None:
        self.priorities = state

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> PrioritizedReplayBufferSamples:
        """Draw transitions in proportion to their priorities."""
        indices, weights = self.priorities.draw(batch_size)
        (there,) = to_device((weights.reshape(-1, 1),), self.device)
        samples = self._get_samples(indices, env)
        return PrioritizedReplayBufferSamples(*samples, there, indices, self._to_go(indices, env))

    def weights(self, batch: PrioritizedReplayBufferSamples) -> th.Tensor:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.weights`."""
        return batch.weights

    def update_priorities(self, indices: NDArray[np.int64], td_errors: NDArray[Any]) -> None:
        """See :meth:`PrioritizedReplayBuffer.update_priorities`."""
        self.priorities.update(indices, td_errors)

    def set_progress(self, remaining: float) -> None:
        """See :meth:`PrioritizedReplayBuffer.set_progress`."""
        self.priorities.set_progress(remaining)
