"""A Minari dataset as the beginning of a replay buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.common.sequences import SequenceReplayBuffer
from sb3_ext.data.checks import DatasetError, same_actions
from sb3_ext.data.envs import is_frame_space, to_channel_first
from sb3_ext.data.minari import DatasetLike
from sb3_ext.data.source import Source, open_source


def fill_replay_buffer(buffer: SequenceReplayBuffer, dataset: DatasetLike) -> int:
    """
    Add every transition of a dataset, episode by episode.

    Single frames are stacked to what the agent sees, with zeros before an episode's first one, as
    :class:`~sb3_ext.data.StackFrames` does. The dataset is read twice: it is checked as a whole before anything is
    added.

    :param buffer: of one environment; large enough for the dataset
    :param dataset: a ``MinariDataset``, an id or a path
    :return: transitions added
    :raises DatasetError: if the dataset is missing, damaged, of other spaces or larger than the buffer
    :raises ValueError: if the buffer is that of several environments
    """
    if buffer.n_envs != 1:
        raise ValueError(f"A dataset can be learnt from with one environment only, there are {buffer.n_envs}.")
    source = open_source(dataset, continuous=True)
    source.warn_if_lossy()
    stack = _stack(source, buffer)
    storage = source.open()
    lengths = source.episode_lengths(storage)
    total = int(lengths.sum())
    if total > buffer.buffer_size - buffer.size():
        raise DatasetError(
            f"{source.name} has {total} steps, the replay buffer has room for {buffer.buffer_size - buffer.size()}; "
            f"set buffer_size to {buffer.size() + total} or more."
        )
    for _ in source.read(storage, source.episodes, lengths, strict=True):
        pass
    actions_space = buffer.action_space
    for episode in source.read(source.open(), source.episodes, lengths, strict=True):
        observations, actions = episode.observations, np.asarray(episode.actions)
        if is_frame_space(source.observation_space):
            observations = _stacked(to_channel_first(observations, source.observation_space), stack)
        if isinstance(actions_space, spaces.Box):
            low, high = actions_space.low, actions_space.high
            actions = (2.0 * (actions - low) / (high - low) - 1.0).astype(np.float32)
        last = len(actions) - 1
        for t in range(len(actions)):
            end = t == last
            infos = [{"TimeLimit.truncated": end and not episode.terminated}]
            following = observations[t + 1][None]
            buffer.add(observations[t][None], following, actions[t][None], episode.rewards[t], np.array([end]), infos)
    return total


def _stack(source: Source, buffer: SequenceReplayBuffer) -> int:
    """How many recorded frames the agent sees at once; refuses datasets of another environment."""
    theirs, ours = source.observation_space, buffer.observation_space
    assert isinstance(ours, spaces.Box)
    shape = theirs.shape
    if is_frame_space(theirs):
        shape = to_channel_first(np.zeros((1, *theirs.shape), theirs.dtype), theirs).shape[1:]
    images = is_frame_space(theirs) and len(shape) == len(ours.shape) == 3
    fits = shape == ours.shape or (images and shape[1:] == ours.shape[1:] and ours.shape[0] % shape[0] == 0)
    if not fits:
        raise DatasetError(
            f"{source.name} is of another environment, or recorded through other wrappers: its observations have shape "
            f"{theirs.shape}, the model's {ours.shape}."
        )
    if not same_actions(source.action_space, buffer.action_space):
        raise DatasetError(
            f"{source.name} is of another environment: its actions are {source.action_space}, the model's "
            f"{buffer.action_space}."
        )
    return ours.shape[0] // shape[0] if images else 1


def _stacked(frames: NDArray[Any], stack: int) -> NDArray[Any]:
    """``[T, C, H, W]`` to ``[T, stack * C, H, W]``, oldest first."""
    if stack == 1:
        return frames
    padded = np.concatenate([np.zeros_like(frames[:1]).repeat(stack - 1, axis=0), frames])
    return np.concatenate([padded[k : k + len(frames)] for k in range(stack)], axis=1)
