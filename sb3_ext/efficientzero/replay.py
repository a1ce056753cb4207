"""Prioritized replay of windows: what follows a step, up to the end of its episode."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.data import checks
from sb3_ext.data.envs import to_channel_first
from sb3_ext.data.load import DatasetLike
from sb3_ext.data.source import open_for_agent
from sb3_ext.replay.device import DeviceRings
from sb3_ext.replay.frames import PADDING_TYPES, split_stacks, stack_episode
from sb3_ext.replay.prioritized import PrioritizedReplayBuffer
from sb3_ext.replay.rings import DictStore, RingStore


class SequenceSamples(NamedTuple):
    """
    Windows of L transitions and L + 1 observations, as numpy arrays. Where an episode ends early, its last observation
    is repeated, actions are those of the last transition and rewards are 0.

    :param observations: ``[B, L + 1, *obs_shape]``; a tensor if the frames lie on a GPU
    :param actions: ``[B, L, action_dim]``; in [-1, 1] if they are continuous
    :param rewards: ``[B, L]``
    :param lengths: transitions of the window that belong to its episode, ``[B]``, 1 to L
    :param terminated: whether the last of them ended the task, ``[B]``; False for time limits and for what goes on
    :param ages: transitions collected by all environments since the window's first one, ``[B]``
    :param weights: importance weights, tensor ``[B, 1]``
    :param indices: of the first transitions, for ``update_priorities``, ``[B]``
    :param positions: where each observation is stored as a transition's first, ``step * n_envs + environment``,
        ``[B, L + 1]``; -1 behind the end of an episode and of what was collected
    :param legal: actions that are legal in each observation, ``[B, L + 1, A]``; a row without any: not known;
        None: none is known
    """

    observations: NDArray[Any] | th.Tensor
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    ages: NDArray[np.int64]
    weights: th.Tensor
    indices: NDArray[np.int64]
    positions: NDArray[np.int64]
    legal: NDArray[np.bool_] | None = None


class SequenceReplayBuffer(PrioritizedReplayBuffer):
    """
    Prioritized replay whose samples are windows of consecutive transitions. Frames of image stacks are stored once.

    :param buffer_size: as in :class:`~sb3_ext.replay.prioritized.PrioritizedReplayBuffer`
    :param observation_space: likewise; ``Box`` only
    :param action_space: likewise
    :param device: likewise
    :param n_envs: likewise
    :param optimize_memory_usage: likewise
    :param length: transitions per window, L
    :param min_weight: smallest importance weight, so that no sample is all but ignored
    :param frames_on_device: with ``optimize_memory_usage``: keep a copy of the frames on the device, which takes 0.7 GB
        for 100,000 frames of 84x84 there, and cut the windows out there; None: on a GPU
    :param kwargs: priorities, see :class:`~sb3_ext.replay.prioritized.PrioritizedReplayBuffer`
    :raises ValueError: if ``length`` is less than 1
    """

    memo: SearchMemo | None = None
    """What searches found from the stored observations, if anyone keeps it here; forgets what is overwritten."""
    _device_rings: DeviceRings | None = None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        length: int,
        min_weight: float = 0.1,
        frames_on_device: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage, **kwargs)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}.")
        self.length, self.min_weight, self.frames_on_device = length, min_weight, frames_on_device
        # sequences must be told apart at every step, also without n-step returns
        self._watch = True
        self._legal: NDArray[np.bool_] | None = None

    def add(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`PrioritizedReplayBuffer.add`; legal actions, if known, come afterwards by :meth:`add_legal`."""
        if self._legal is not None:
            self._legal[self.pos] = False
        if self.memo is not None:
            self.memo.forget(self.pos * self.n_envs + np.arange(self.n_envs))
        super().add(*args, **kwargs)

    def add_legal(self, legal: NDArray[np.bool_]) -> None:
        """Say which actions ``[n_envs, A]`` were legal in the observations of the transitions that were added last."""
        if self._legal is None:
            self._legal = np.zeros((self.buffer_size, *legal.shape), bool)
        self._legal[self.pos - 1] = legal

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SequenceSamples:  # type: ignore[override]
        """
        Draw windows in proportion to the priorities of their first transitions.

        :param batch_size: B
        :param env: VecNormalize to apply
        :return: the windows
        :raises ValueError: if nothing was stored yet
        """
        indices, weights = self.priorities.draw(batch_size)
        weights = np.maximum(weights, self.min_weight, dtype=np.float32)
        return self.windows(indices, weights, env)

    def windows(
        self, indices: NDArray[np.int64], weights: NDArray[np.float32], env: VecNormalize | None = None
    ) -> SequenceSamples:
        """
        Cut windows out.

        :param indices: first transitions, ``step * n_envs + environment``, ``[B]``
        :param weights: importance weights, ``[B]``
        :param env: VecNormalize to apply
        :return: the windows
        """
        places = np.arange(self.length + 1)
        steps = places[:-1]
        step, which = np.divmod(indices, self.n_envs)
        newest = (self.pos - 1 - step) % self.buffer_size
        positions = (step[:, None] + places) % self.buffer_size * self.n_envs + which[:, None]
        window, ended = positions[:, :-1], self._ends.reshape(-1)
        ends = ended[window] | (steps >= newest[:, None])
        ends[:, -1] = True
        lengths = ends.argmax(axis=1) + 1
        # a transition beyond the end is the last one again
        last = np.take_along_axis(window, np.minimum(steps[None], lengths[:, None] - 1), axis=1)
        rewards = self._normalize_reward(self.rewards.reshape(-1)[window], env)
        # a window's last observation is stored only where its sequence goes on
        goes_on = ~ended[last[:, -1]] & (lengths <= newest)
        positions = np.where(places < (lengths + goes_on)[:, None], positions, -1)
        legal = None
        if self._legal is not None:
            legal = self._legal.reshape(-1, self._legal.shape[2])[positions]
            legal[positions < 0] = False
        return SequenceSamples(
            observations=self._windows_of_observations(indices, last, env),
            actions=self.actions.reshape(-1, self.action_dim)[last],
            rewards=np.where(steps < lengths[:, None], rewards, 0).astype(np.float32),
            lengths=lengths,
            terminated=self.dones.reshape(-1)[last[:, -1]].astype(bool),
            ages=newest * self.n_envs,
            weights=th.from_numpy(weights.reshape(-1, 1)).to(self.device),
            indices=indices,
            positions=positions,
            legal=legal,
        )

    def _windows_of_observations(
        self, indices: NDArray[np.int64], last: NDArray[np.int64], env: VecNormalize | None
    ) -> NDArray[Any] | th.Tensor:
        on_device = self.device.type == "cuda" if self.frames_on_device is None else self.frames_on_device
        if on_device and isinstance(self.store, RingStore) and not (env is not None and env.norm_obs):
            if self._device_rings is None:
                self._device_rings = DeviceRings(self.store, self.device)
            return self._device_rings.take_windows(indices, last)
        assert not isinstance(self.store, DictStore)
        observations = self.store.take_windows(indices, last)
        normalized = self._normalize_obs(observations.reshape(-1, *observations.shape[2:]), env)
        return normalized.reshape(observations.shape)  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device_rings": None}


class SearchMemo:
    """
    Values and search results by position in a replay buffer, which has so many of them.

    Every array has a last row more, of zeros, which is never written: position -1 stands for "stored nowhere".
    """

    def __init__(self, size: int) -> None:
        self.valued = np.zeros(size + 1, bool)
        """Whether the network's value of a position is known."""
        self.searched = np.zeros(size + 1, bool)
        """Whether the results of a search are known."""
        self.depth = 0.0
        """Of the last searches, mean."""
        self.settings = ""
        """What results depend on besides the network; see :meth:`follow`."""
        self._arrays: dict[str, NDArray[Any]] = {}
        self._fingerprint: tuple[int, str] | None = None
        self._versions: tuple[str, tuple[tuple[int, int], ...]] = "", ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_versions": ("", ())}  # addresses mean nothing in another process

    def follow(self, network: th.nn.Module) -> None:
        """
        Forget everything if the network that searches, or :attr:`settings`, are not what they were at the last call,
        also before saving and loading.
        """
        tensors = network.state_dict().values()
        versions = self.settings, tuple((x.data_ptr(), x._version) for x in tensors)
        if versions == self._versions:
            return
        fingerprint = 0
        for tensor in tensors:
            fingerprint = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(th.uint8).numpy(), fingerprint)
        if (fingerprint, self.settings) != self._fingerprint:
            self.forget(slice(None))
            self._arrays.clear()
        self._fingerprint, self._versions = (fingerprint, self.settings), versions

    def forget(self, positions: NDArray[np.int64] | slice) -> None:
        """Forget what was found from observations at positions that are overwritten."""
        self.valued[positions] = self.searched[positions] = False

    def put(self, positions: NDArray[np.int64], name: str, results: NDArray[Any]) -> None:
        """
        Keep results ``[N, ...]`` of positions ``[N]``, -1 left out; ``"values"`` are the network's, other names a
        search's, which all belong together.
        """
        if name not in self._arrays:
            self._arrays[name] = np.zeros((len(self.valued), *results.shape[1:]), results.dtype)
        stored = positions >= 0
        at = positions[stored]
        self._arrays[name][at] = results[stored]
        (self.valued if name == "values" else self.searched)[at] = True

    def get(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Results ``[*positions.shape, ...]`` that :meth:`put` got under a name; zeros at -1."""
        found: NDArray[Any] = self._arrays[name][positions]
        return found


def fill_replay_buffer(
    buffer: SequenceReplayBuffer,
    dataset: DatasetLike,
    policy: BasePolicy,
    padding_shown: Callable[[int], frozenset[str]] = lambda n_frames: frozenset(PADDING_TYPES),
    transforms: list[Any] | None = None,
) -> int:
    """
    Add every transition of a dataset, episode by episode, to the buffer of one environment; say how many.

    Single frames are stacked to what the agent sees. The dataset is read twice: it is checked as a whole before
    anything is added. The policy scales continuous actions. If there are stacks, ``padding_shown`` tells for so many
    frames per observation what the agent's environment has before an episode's first one, as
    :func:`~sb3_ext.data.envs.padding_shown_by` does. Default: not known, so zeros. ``transforms`` are those that the
    environment goes through.

    :raises DatasetError: if the dataset is missing, damaged, of other spaces or larger than the buffer, or has recorded
        frame stacks that begin an episode otherwise than the environment's
    :raises ValueError: if the buffer is that of several environments
    """
    if buffer.n_envs != 1:
        raise ValueError(f"A dataset can be learnt from with one environment only, there are {buffer.n_envs}.")
    source = open_for_agent(dataset, buffer.observation_space, transforms)
    stack = checks.frames_per_observation(source.name, source.observation_space, buffer.observation_space)
    checks.check_same_actions(source.name, source.action_space, buffer.action_space)
    storage = source.open()
    lengths = source.episode_lengths(storage)
    total = int(lengths.sum())
    if total > buffer.buffer_size - buffer.size():
        raise checks.DatasetError(
            f"{source.name} has {total} steps, the replay buffer has room for {buffer.buffer_size - buffer.size()}; "
            f"set buffer_size to {buffer.size() + total} or more."
        )
    same = source.observation_space.shape == buffer.observation_space.shape
    recorded, shown = checks.ready_made_frames(source.observation_space) if stack == 1 else 1, None
    for number, episode in enumerate(source.read(storage, source.episodes, lengths, strict=False)):
        if recorded > 1:
            frames = episode.observations if same else to_channel_first(episode.observations, source.observation_space)
            if shown is None and split_stacks(frames, recorded) is not None:
                shown = padding_shown(recorded)
            if shown is not None:
                checks.check_recorded_padding(source.name, number, frames, recorded, shown)
    padding_type = checks.choose_padding(source.name, padding_shown(stack), stack) if stack > 1 else "zero"
    source.warn()
    for episode in source.read(source.open(), source.episodes, lengths, strict=False):
        frames = episode.observations if same else to_channel_first(episode.observations, source.observation_space)
        actions = np.asarray(episode.actions)
        if isinstance(buffer.action_space, spaces.Box):
            actions = policy.scale_action(actions)
        observations = stack_episode(frames, stack, padding_type)
        for t in range(len(actions)):
            end = t == len(actions) - 1
            infos = [{"TimeLimit.truncated": end and not episode.terminated}]
            now, then = observations[t : t + 1], observations[t + 1 : t + 2]
            buffer.add(now, then, actions[t : t + 1], episode.rewards[t], np.array([end]), infos)
    return total
