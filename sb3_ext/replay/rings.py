"""Where a replay buffer keeps its observations: as pairs, as dictionaries of pairs, or as single frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from numba import njit
from numpy.typing import NDArray
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space

_SLACK = 0.02
"""Share of rows that a ring has beyond its transitions, for the frames before each episode's first step."""

Ints = NDArray[np.int64]
Expired = Iterator[tuple[int, Ints]]


class PairStore:
    """Observation and next observation of every transition, as they come, for ``size`` steps of E environments."""

    def __init__(self, size: int, n_envs: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.observations = np.zeros((size, n_envs, *shape), dtype)
        self.next_observations = np.zeros((size, n_envs, *shape), dtype)
        self._newest = 0

    def continues(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell which environments go on from their last next observation, ``[E]``, given ``obs`` ``[E, *shape]``."""
        last = self.next_observations[self._newest]
        obs = obs.reshape(last.shape).astype(last.dtype, copy=False)  # what is stored has the space's dtype
        same: NDArray[np.bool_] = (last == obs).reshape(len(last), -1).all(axis=1)
        return same

    def add(self, pos: int, obs: NDArray[Any], next_obs: NDArray[Any], _goes_on: NDArray[np.bool_]) -> Expired:
        """Store a step, ``[E, *shape]``, at ``pos``; nothing expires before it is overwritten."""
        row = self.observations[pos]
        row[...] = obs.reshape(row.shape)
        self.next_observations[pos] = next_obs.reshape(row.shape)
        self._newest = pos
        return iter(())

    def take(self, indices: Ints, last: Ints) -> tuple[Any, Any]:
        """
        Copy out the observations of the transitions ``indices`` and the next observations of ``last``.

        A transition's number is ``step * E + environment``; both are ``[B]``, what is returned is ``[B, *shape]``.
        """
        shape = (-1, *self.observations.shape[2:])
        # take() is a third faster than indexing for short rows
        observations = self.observations.reshape(shape).take(indices, axis=0)
        return observations, self.next_observations.reshape(shape).take(last, axis=0)

    def take_windows(self, indices: Ints, last: Ints) -> NDArray[Any]:
        """Copy out the observations of ``indices``, ``[B]``, each followed by the next ones of ``last``, ``[B, L]``."""
        first, later = self.take(indices, last.reshape(-1))
        return np.concatenate([first[:, None], later.reshape(*last.shape, *first.shape[1:])], axis=1)


class DictStore:
    """One :class:`PairStore` per key."""

    def __init__(self, size: int, n_envs: int, space: spaces.Dict) -> None:
        self.parts = {
            key: PairStore(size, n_envs, get_obs_shape(part), part.dtype)  # type: ignore[arg-type]
            for key, part in space.spaces.items()
        }

    def continues(self, obs: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """See :meth:`PairStore.continues`."""
        same: NDArray[np.bool_] = np.all([part.continues(obs[key]) for key, part in self.parts.items()], axis=0)
        return same

    def add(self, pos: int, obs: Any, next_obs: Any, goes_on: NDArray[np.bool_]) -> Expired:
        """See :meth:`PairStore.add`."""
        for key, part in self.parts.items():
            part.add(pos, obs[key], next_obs[key], goes_on)
        return iter(())

    def take(self, indices: Ints, last: Ints) -> tuple[Any, Any]:
        """See :meth:`PairStore.take`."""
        found = {key: part.take(indices, last) for key, part in self.parts.items()}
        return {key: pair[0] for key, pair in found.items()}, {key: pair[1] for key, pair in found.items()}


class RingStore:
    """
    Every frame once: a ring of frames per environment, in which an observation is ``frame_stack`` neighbours.

    A sequence begins with the frames of its first observation, whatever they are (zeros, repetitions), and every step
    adds the newest frame of its next observation, also the last step. Vectors are stacks of one.

    :param size: steps to keep, S, of each of ``n_envs`` environments, E
    :param frame_stack: frames per observation, k; None: the channels of an image unless they are 3, else 1
    :raises ValueError: if the observations are no ``Box``, or the first axis is no multiple of k
    """

    def __init__(self, size: int, n_envs: int, space: spaces.Space[Any], frame_stack: int | None) -> None:
        if not isinstance(space, spaces.Box) or not space.shape:
            raise ValueError(f"optimize_memory_usage=True needs Box observations, not {space}; set it to False.")
        length = space.shape[0]
        if frame_stack is None:
            frame_stack = length if is_image_space(space) and length != 3 else 1
        if frame_stack < 1 or length % frame_stack:
            raise ValueError(f"frame_stack={frame_stack}: observations of shape {space.shape} are no such stacks.")
        self.frame_stack, self.size = frame_stack, size
        self._channels = length // frame_stack
        self._n_rows = size + int(_SLACK * size) + 2 * frame_stack + 1
        self.frames = np.zeros((n_envs, self._n_rows, self._channels, *space.shape[1:]), space.dtype)
        # frames written so far; steps added so far; first step that is whole; row of the newest frame of each step
        self._written = np.zeros(n_envs, np.int64)
        self._added, self._first = 0, np.zeros(n_envs, np.int64)
        self._rows = np.zeros((size, n_envs), np.int64)
        self._last = np.zeros((n_envs, *space.shape), space.dtype)

    def reset(self) -> None:
        """Forget every step; the next one goes to position 0."""
        self._first[:], self._added = 0, 0

    def continues(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """See :meth:`PairStore.continues`."""
        obs = obs.astype(self._last.dtype, copy=False)
        return np.array([np.array_equal(a, b) for a, b in zip(self._last, obs, strict=True)])

    def _append(self, env: int, frames: NDArray[Any]) -> None:
        for frame in frames.reshape(-1, *self.frames.shape[2:]):
            self.frames[env, self._written[env] % self._n_rows] = frame
            self._written[env] += 1

    def add(self, pos: int, obs: NDArray[Any], next_obs: NDArray[Any], goes_on: NDArray[np.bool_]) -> Expired:
        """
        Store a step, ``[E, *shape]``; ``goes_on``, ``[E]``: ``obs`` is the last ``next_obs`` of this environment.

        :return: environment and steps whose frames were overwritten, although they are not overwritten themselves
        :raises ValueError: if ``next_obs`` is not ``obs`` moved on by one frame; nothing is stored then
        """
        c = self._channels
        if self.frame_stack > 1 and not np.array_equal(next_obs[:, :-c], obs[:, c:]):
            raise ValueError(
                f"optimize_memory_usage=True with frame_stack={self.frame_stack}: an observation is not the one before "
                "moved on by one frame along the first axis. Set frame_stack to the number of frames stacked, or "
                "optimize_memory_usage=False."
            )
        for env in np.flatnonzero(~goes_on).tolist():
            self._append(env, obs[env])
        self._rows[pos] = self._written - 1
        for env, newest in enumerate(next_obs[:, -c:]):
            self._append(env, newest)
        self._last[...] = next_obs
        self._added += 1
        return self._expired()

    def _expired(self) -> Expired:
        oldest_step = max(0, self._added - self.size)
        for env, written in enumerate(self._written):
            start = first = max(int(self._first[env]), oldest_step)
            while first < self._added and (
                self._rows[first % self.size, env] - self.frame_stack + 1 < written - self._n_rows
            ):
                first += 1
            self._first[env] = first
            if first > start:
                yield env, np.arange(start, first) % self.size

    def take(self, indices: Ints, last: Ints) -> tuple[Any, Any]:
        """See :meth:`PairStore.take`; without n-step returns both are views of the same frames."""
        k, c, first = self.frame_stack, self._channels, np.full(len(indices), 1 - self.frame_stack)
        if last is indices:
            both = self._stacks(indices, first, k + 1)
            return both[:, :-c], both[:, c:]
        return self._stacks(indices, first, k), self._stacks(last, first + 1, k)

    def take_windows(self, indices: Ints, last: Ints) -> NDArray[Any]:
        """See :meth:`PairStore.take_windows`; nothing is copied twice."""
        both, first = self._window(indices, last)
        out = self._stacks(both.reshape(-1), first.reshape(-1), self.frame_stack)
        return out.reshape(*both.shape, *out.shape[1:])

    @property
    def written(self) -> Ints:
        """Frames written so far, ``[E]``; number i lies in row ``i % rows``."""
        return self._written

    def window_rows(self, indices: Ints, last: Ints) -> Ints:
        """Where the frames of :meth:`take_windows` lie: ``environment * rows + row``, ``[B, L + 1, k]``."""
        both, first = self._window(indices, last)
        rows = (self._rows.reshape(-1)[both] + first)[..., None] + np.arange(self.frame_stack)
        return rows % self._n_rows + (both % len(self.frames) * self._n_rows)[..., None]

    def _window(self, indices: Ints, last: Ints) -> tuple[Ints, Ints]:
        """Transitions of a window, and where their first frame is from the newest one."""
        both = np.concatenate([indices[:, None], last], axis=1)
        first = np.full(both.shape, 2 - self.frame_stack)
        first[:, 0] -= 1
        return both, first

    def _stacks(self, indices: Ints, first: Ints, count: int) -> NDArray[Any]:
        """``count`` frames of each transition, the first of them ``first`` after its newest one."""
        out = np.empty((len(indices), count * self._channels, *self.frames.shape[3:]), self.frames.dtype)
        frames = self.frames.reshape(*self.frames.shape[:2], -1).view(np.uint8)
        _copy(frames, self._rows.reshape(-1), indices, first, out.view(np.uint8).reshape(len(indices), count, -1))
        return out


@njit(cache=True)
def _copy(frames: NDArray[np.uint8], rows: Ints, indices: Ints, first: Ints, out: NDArray[np.uint8]) -> None:
    """Copy neighbouring frames out of the rings ``[E, R, bytes]``, for transition ``step * E + environment``."""
    n_envs, n_rows, size = frames.shape
    for i in range(len(indices)):
        env = indices[i] % n_envs
        row = rows[indices[i]] + first[i]
        for k in range(out.shape[1]):
            source = frames[env, (row + k) % n_rows]
            target = out[i, k]
            for byte in range(size):
                target[byte] = source[byte]
