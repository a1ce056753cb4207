"""Prioritized experience replay as an SB3 replay buffer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.replay.batch import PrioritizedReplayBufferSamples, ReplayHooks, n_step_returns, to_device
from sb3_ext.replay.priorities import Priorities
from sb3_ext.replay.rings import DictStore, PairStore, RingStore

Array = NDArray[Any]

_UNANSWERED = 10
"""Batches in a row without new priorities before the user is told that they are never learnt from."""


class PrioritizedReplayBuffer(ReplayBuffer, ReplayHooks):
    """
    Prioritized experience replay (Schaul et al., 2016, https://arxiv.org/abs/1511.05952) for ``replay_buffer_class``.

    ``sb3_ext.DQN`` and ``QRDQN`` weight their losses with it and give the absolute TD errors back. SB3's own algorithms
    do neither: with them this buffer only warns and stays uniform.

    Works with ``Box``, ``Discrete``, ``MultiDiscrete``, ``MultiBinary`` and ``Dict`` observations and any number of
    environments; every environment's transition has a priority of its own.

    :param buffer_size: transitions to keep, over all environments
    :param observation_space: as in SB3
    :param action_space: as in SB3
    :param device: as in SB3
    :param n_envs: as in SB3
    :param optimize_memory_usage: store every frame once, and rebuild stacks and next observations from the frames: 7 kB
        instead of 56 kB per 84x84x4 transition. Unlike SB3's variant this keeps every final observation, so it goes
        with ``handle_timeout_termination``. With many episodes shorter than about 150 steps the oldest transitions go a
        little early
    :param handle_timeout_termination: bootstrap from episodes that a time limit cut
    :param alpha: how much errors decide; 0 is uniform replay, 1 full prioritization
    :param beta: exponent of the importance weights at the start of the run, or a function of the remaining progress
        (1 to 0); higher corrects more of the bias and slows learning from rare transitions
    :param final_beta: the exponent at the end of the run, reached linearly; set it to ``beta`` for a constant
    :param eps: added to every absolute error; higher is more uniform
    :param rank_based: priorities ``1 / rank`` instead of errors
    :param stratified: see :class:`~sb3_ext.replay.priorities.Priorities`
    :param n_steps: rewards summed before bootstrapping; a transition can be drawn once its n steps are complete
    :param gamma: discount factor of that sum. ``sb3_ext.DQN`` and ``QRDQN`` pass both on by themselves
    :param frame_stack: for ``optimize_memory_usage``: frames per observation, along the first (channel) axis. Default:
        the number of channels of an image with other than 3 channels, else 1
    :param seed: seed of the sampler; default: drawn from numpy's global generator, which SB3 seeds
    :raises ValueError: if a number is out of range, or observations cannot be taken apart into frames
    """

    dones: NDArray[np.float32]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        alpha: float = 0.6,
        beta: float | Callable[[float], float] = 0.4,
        final_beta: float = 1.0,
        eps: float = 1e-6,
        rank_based: bool = False,
        stratified: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
        frame_stack: int | None = None,
        seed: int | None = None,
    ) -> None:
        # not ReplayBuffer.__init__: it would allocate observations twice, and refuses to store final ones
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = size = max(buffer_size // n_envs, 1)
        # a buffer of one step is that of a model which is loaded to predict only
        if n_steps < 1 or n_steps > size > 1:
            raise ValueError(f"n_steps must be between 1 and the {size} steps the buffer holds, got {n_steps}.")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma}.")
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps, self.gamma = n_steps, gamma
        self.store: PairStore | DictStore | RingStore
        if optimize_memory_usage:
            self.store = RingStore(size, n_envs, observation_space, frame_stack)
        elif isinstance(observation_space, spaces.Dict):
            self.store = DictStore(size, n_envs, observation_space)
        else:
            self.store = PairStore(size, n_envs, self.obs_shape, observation_space.dtype)  # type: ignore[arg-type]
        dtype = self._maybe_cast_dtype(action_space.dtype)
        self.actions = np.zeros((size, n_envs, self.action_dim), dtype)
        self.rewards = np.zeros((size, n_envs), np.float32)
        # unlike SB3's: terminations only, so that sampling need not look at time limits
        self.dones = np.zeros((size, n_envs), np.float32)
        self._ends = np.zeros((size, n_envs), bool)
        self.priorities = Priorities(
            size * n_envs,
            alpha=alpha, beta=beta, final_beta=final_beta, eps=eps, rank_based=rank_based, stratified=stratified,
            seed=seed,
        )  # fmt: skip
        self._envs = np.arange(n_envs)
        # whether the next observation of an environment must be the last one seen, and how many of its newest
        # transitions still miss some of their n steps
        self._goes_on, self._pending = np.zeros(n_envs, bool), np.zeros(n_envs, np.int64)
        self._watch = optimize_memory_usage or n_steps > 1
        self._unanswered = 0

    def reset(self) -> None:
        """Forget everything but the largest priority."""
        super().reset()
        if hasattr(self, "priorities"):
            self.priorities.tree.fill(0, self.buffer_size * self.n_envs, 0.0)
            self._goes_on[:], self._pending[:] = False, 0
            if isinstance(self.store, RingStore):
                self.store.reset()

    def add(
        self, obs: Any, next_obs: Any, action: Array, reward: Array, done: Array, infos: list[dict[str, Any]]
    ) -> None:
        """
        Add one transition of every environment, with the largest priority.

        :param obs: ``[n_envs, *obs_shape]``
        :param next_obs: ``[n_envs, *obs_shape]``; after an episode's end its final observation, not the reset's
        :param action: ``[n_envs, *action_shape]``
        :param reward: ``[n_envs]``
        :param done: ``[n_envs]``
        :param infos: their ``"TimeLimit.truncated"`` tells time limits from terminations
        :raises ValueError: if ``optimize_memory_usage`` is on and the observations are not stacks of frames
        """
        pos = self.pos
        if self._watch:
            if self.n_steps > self.buffer_size:
                raise ValueError(
                    f"A buffer of {self.buffer_size} step cannot hold n_steps={self.n_steps}: it serves a model that "
                    "only predicts. Load the model with a larger buffer_size to learn."
                )
            if self.full:
                self.priorities.tree.fill(pos * self.n_envs, self.n_envs, 0.0)
            self._close(self._goes_on & ~self.store.continues(obs))
            for env, slots in self.store.add(pos, obs, next_obs, self._goes_on):
                self.priorities.deactivate(slots * self.n_envs + env)
        else:
            self.store.add(pos, obs, next_obs, self._goes_on)
        self.actions[pos] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[pos] = reward
        self.dones[pos] = done
        if self.handle_timeout_termination:
            for env, info in enumerate(infos):
                if info.get("TimeLimit.truncated", False):
                    self.dones[pos, env] = 0
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full, self.pos = True, 0
        if not self._watch:
            self.priorities.activate_range(pos * self.n_envs, self.n_envs)
            return
        self._ends[pos] = False
        self._goes_on[:] = True
        self._pending += 1
        complete = self._pending == self.n_steps
        if complete.any():
            first = (pos - self.n_steps + 1) % self.buffer_size
            self.priorities.activate(first * self.n_envs + self._envs[complete])
            self._pending[complete] -= 1
        self._close(np.asarray(done, bool))

    def end_sequences(self) -> None:
        """Say that every environment begins anew: what comes next does not follow what was added last."""
        if self._watch:
            self._close(self._goes_on.copy())

    def _close(self, envs: NDArray[np.bool_]) -> None:
        """End the sequences of these environments at the newest transition: all their returns are complete now."""
        if not envs.any():
            return
        newest = (self.pos - 1) % self.buffer_size
        self._ends[newest, envs] = True
        self._goes_on[envs] = False
        for env in np.flatnonzero(envs & (self._pending > 0)):
            slots = (newest - np.arange(self._pending[env])) % self.buffer_size
            self.priorities.activate(slots * self.n_envs + env)
        self._pending[envs] = 0

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> PrioritizedReplayBufferSamples:
        """
        Draw transitions in proportion to their priorities, with replacement.

        :param batch_size: B
        :param env: VecNormalize to apply, as in SB3
        :return: SB3's fields, importance weights ``[B, 1]`` and indices ``[B]``
        :raises ValueError: if nothing was added yet
        """
        self._unanswered += 1
        if self._unanswered == _UNANSWERED and self.priorities.alpha > 0:
            warnings.warn(
                f"PrioritizedReplayBuffer: {_UNANSWERED} batches were drawn and no priorities came back, so sampling "
                "stays uniform and the importance weights are ignored. Use sb3_ext.DQN or QRDQN instead of SB3's, or "
                "call update_priorities(batch.indices, td_errors) after each batch.",
                stacklevel=2,
            )
        if self.priorities.tree.total == 0 and self._pending.any():
            return self._gather(self._incomplete(batch_size), np.ones(batch_size, np.float32), env)
        indices, weights = self.priorities.draw(batch_size)
        return self._gather(indices, weights, env)

    def _incomplete(self, batch_size: int) -> NDArray[np.int64]:
        """Draw uniformly from transitions that miss some of their n steps, as long as there are no others."""
        steps = [np.arange(n) for n in self._pending]
        which = np.repeat(self._envs, self._pending)
        slots = (self.pos - 1 - np.concatenate(steps)) % self.buffer_size * self.n_envs + which
        return self.priorities.rng.choice(slots, batch_size)

    def _gather(
        self, indices: NDArray[np.int64], weights: NDArray[np.float32], env: VecNormalize | None
    ) -> PrioritizedReplayBufferSamples:
        last, rewards, discounts = self._n_step(indices, env)
        observations, next_observations = self.store.take(indices, last)
        tensors = to_device(
            (
                self._normalize_obs(observations, env),
                self.actions.reshape(-1, self.action_dim).take(indices, axis=0),
                self._normalize_obs(next_observations, env),
                self.dones.take(last).reshape(-1, 1),
                rewards.reshape(-1, 1),
                None if discounts is None else discounts.reshape(-1, 1),
                weights.reshape(-1, 1),
            ),
            self.device,
        )
        return PrioritizedReplayBufferSamples._make((*tensors, indices, None))

    def weights(self, batch: PrioritizedReplayBufferSamples) -> th.Tensor:
        """See :meth:`~sb3_ext.replay.batch.ReplayHooks.weights`."""
        return batch.weights

    def _n_step(
        self, indices: NDArray[np.int64], env: VecNormalize | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
        """Last transition, summed reward and discount; the sum stops with a sequence and the newest transition."""
        if self.n_steps == 1:
            return indices, self._normalize_reward(self.rewards.take(indices), env), None
        step, which = np.divmod(indices, self.n_envs)
        window = (step[:, None] + np.arange(self.n_steps)) % self.buffer_size * self.n_envs + which[:, None]
        ends = self._ends.reshape(-1)[window] | (window // self.n_envs == (self.pos - 1) % self.buffer_size)
        ends[:, -1] = True
        last = ends.argmax(axis=1)
        rewards = self._normalize_reward(self.rewards.reshape(-1)[window], env)
        summed, discounts = n_step_returns(rewards, last + 1, self.gamma)
        return window[np.arange(len(last)), last], summed.astype(np.float32), discounts.astype(np.float32)

    def update_priorities(self, indices: NDArray[np.int64], td_errors: NDArray[Any]) -> None:
        """
        Learn from the errors of a batch.

        :param indices: ``batch.indices``
        :param td_errors: of any sign, ``[B]``; of an index that occurs twice the last one counts
        :raises ValueError: if an error is NaN or infinite: names the index
        """
        self._unanswered = 0
        self.priorities.update(indices, td_errors)

    def set_progress(self, remaining: float) -> None:
        """
        Anneal beta; the training loop calls this.

        :param remaining: share of the run that is left, 1 to 0
        """
        self.priorities.set_progress(remaining)
