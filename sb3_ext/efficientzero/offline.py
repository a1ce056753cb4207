"""A Minari dataset as the beginning of a replay buffer."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_ext.data.checks import DatasetError, check_same_actions, frames_per_observation
from sb3_ext.data.envs import to_channel_first
from sb3_ext.data.minari import DatasetLike
from sb3_ext.data.source import open_source
from sb3_ext.efficientzero.replay import SequenceReplayBuffer
from sb3_ext.replay.frames import ArrayFrames, gather_stacks


def fill_replay_buffer(buffer: SequenceReplayBuffer, dataset: DatasetLike, policy: BasePolicy) -> int:
    """
    Add every transition of a dataset, episode by episode.

    Single frames are stacked to what the agent sees, with zeros before an episode's first one, as
    :class:`~sb3_ext.data.StackFrames` does. The dataset is read twice: it is checked as a whole before anything is
    added.

    :param buffer: of one environment; large enough for the dataset
    :param dataset: a ``MinariDataset``, an id or a path
    :param policy: scales continuous actions
    :return: transitions added
    :raises DatasetError: if the dataset is missing, damaged, of other spaces or larger than the buffer
    :raises ValueError: if the buffer is that of several environments
    """
    if buffer.n_envs != 1:
        raise ValueError(f"A dataset can be learnt from with one environment only, there are {buffer.n_envs}.")
    source = open_source(dataset, continuous=True)
    source.warn_if_lossy()
    stack = frames_per_observation(source.name, source.observation_space, buffer.observation_space)
    check_same_actions(source.name, source.action_space, buffer.action_space)
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
    for episode in source.read(source.open(), source.episodes, lengths, strict=True):
        frames, actions = episode.observations, np.asarray(episode.actions)
        if source.observation_space.shape != buffer.observation_space.shape:
            frames = to_channel_first(frames, source.observation_space)
        if isinstance(buffer.action_space, spaces.Box):
            actions = policy.scale_action(actions)
        steps = np.arange(len(actions))
        observations, following = gather_stacks(ArrayFrames(frames), steps, steps, stack, pad_with_zeros=True)
        for t in steps:
            end = t == steps[-1]
            infos = [{"TimeLimit.truncated": end and not episode.terminated}]
            now, then = observations[t : t + 1], following[t : t + 1]
            buffer.add(now, then, actions[t : t + 1], episode.rewards[t], np.array([end]), infos)
    return total
