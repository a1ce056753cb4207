"""Demonstrations from Minari datasets, imitation trajectories, recorded episodes and SB3 replay buffers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import gymnasium as gym
import minari
import numpy as np
import torch as th
from gymnasium import spaces
from imitation.data.types import DictObs, Trajectory
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_ext.data import DatasetError, Episode
from sb3_ext.data.checks import (
    check_actions,
    check_observations,
    check_recorded_padding,
    check_same_actions,
    choose_padding,
    frames_per_observation,
    ready_made_frames,
)
from sb3_ext.data.envs import is_frame_space, padding_shown_by, to_channel_first
from sb3_ext.data.source import DatasetLike, env_spec, open_for_agent
from sb3_ext.data.transforms.pipeline import transforms_of
from sb3_ext.data.trees import short_space
from sb3_ext.gail.discriminator import Batch
from sb3_ext.normalize import begin_statistics
from sb3_ext.replay.batch import unscaled
from sb3_ext.replay.frames import ArrayFrames, gather_stacks, gather_windows, split_stacks, stack_episode

DemonstrationsLike: TypeAlias = DatasetLike | Sequence[Trajectory] | Sequence[Episode] | ReplayBuffer


@dataclass(frozen=True)
class Demonstration:
    """
    One demonstrated episode, or piece of one, of T steps.

    :param observations: ``[T + 1, ...]``, single frames if the agent sees stacks
    :param actions: ``[T]`` or ``[T, ...]``
    :param terminated: whether the last step ended the task; False if a time limit did, or nothing
    :param from_start: whether the first observation is an episode's first
    """

    observations: NDArray[Any]
    actions: NDArray[Any]
    terminated: bool
    from_start: bool = True


class Demonstrations:
    """
    Demonstrated transitions, checked against the spaces of the agent that shall imitate them.

    Every frame is kept once; stacks are rebuilt when a batch is drawn.

    :param demonstrations: any of the kinds that :class:`~sb3_ext.gail.GAIL` takes; errors are those named there
    :param env: the agent's, for its time limit, its id, and what stands before an episode's first frame, see
        :meth:`match_padding`; without one, zeros do
    :param device: where batches go; pictures are kept on the CPU
    """

    def __init__(
        self,
        demonstrations: DemonstrationsLike,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        env: VecEnv | None = None,
        device: th.device | str = "cpu",
    ) -> None:
        self.name, found, frame_space = _read(demonstrations, observation_space, action_space, env)
        if not found:
            raise DatasetError(f"{self.name}: there is no episode in it.")
        self.frame_stack = frames_per_observation(self.name, frame_space, observation_space)
        if frame_space.shape != observation_space.shape:
            found = [replace(d, observations=to_channel_first(d.observations, frame_space)) for d in found]
        self.trajectories = found
        self.padding_type = "zero"
        self.n_frames = self.frame_stack
        """Frames in an observation, also where stacks were recorded."""
        if self.frame_stack == 1:
            recorded = ready_made_frames(frame_space)
            if recorded > 1 and split_stacks(found[0].observations, recorded) is not None:
                self.n_frames = recorded
        if env is not None:
            self.match_padding(env)
        self.device = th.device(device)
        frames = np.concatenate([d.observations for d in found])
        self._store, self._frames = ArrayFrames(frames), th.as_tensor(frames)
        self._actions = th.as_tensor(np.concatenate([d.actions for d in found]))
        lengths = np.array([len(d.actions) for d in found])
        self._age = np.concatenate([np.arange(n) for n in lengths])
        last = self._age == np.repeat(lengths, lengths) - 1
        self._terminated = th.as_tensor(last & np.repeat([d.terminated for d in found], lengths)).float()
        # an episode has one frame more than it has transitions
        self._rows = th.as_tensor(np.arange(len(last)) + np.repeat(np.arange(len(found)), lengths))
        if not is_frame_space(observation_space):
            self._frames, self._actions = self._frames.to(self.device), self._actions.to(self.device)
            self._terminated, self._rows = self._terminated.to(self.device), self._rows.to(self.device)

    def __len__(self) -> int:
        """Number of transitions."""
        return len(self._actions)

    @property
    def n_terminated(self) -> int:
        """Number of episodes that ended the task."""
        return sum(d.terminated for d in self.trajectories)

    def match_padding(self, env: VecEnv) -> None:
        """
        Stack single frames as the environment does at the start of an episode, and refuse recorded stacks that differ.

        It is reset once if ``n_frames`` > 1; see :func:`~sb3_ext.data.envs.padding_shown_by`.
        """
        if self.n_frames == 1:
            return
        shown = padding_shown_by(env, self.n_frames)
        if self.frame_stack > 1:
            self.padding_type = choose_padding(self.name, shown, self.n_frames)
            return
        for number, d in enumerate(self.trajectories):
            if d.from_start:
                check_recorded_padding(self.name, number, d.observations, self.n_frames, shown)

    def _observations(self, which: th.Tensor, next_observations: bool) -> list[th.Tensor]:
        rows = self._rows[which]
        if self.frame_stack == 1:
            return [self._frames[rows], self._frames[rows + 1]] if next_observations else [self._frames[rows]]
        places = self._store, rows.numpy(), self._age[which.numpy()], self.frame_stack, self.padding_type
        found = gather_stacks(*places) if next_observations else (gather_windows(*places, length=0),)
        return [th.from_numpy(stacks) for stacks in found]

    def get(self, which: th.Tensor, normalize: VecNormalize | None = None, next_observations: bool = True) -> Batch:
        """
        Transitions by number, ``[B]``, on the device, with observations as ``normalize`` makes them now.

        :param next_observations: False returns the observations in their place
        """
        which = which.to(self._rows.device)
        observations = self._observations(which, next_observations)
        if normalize is not None:
            observations = [th.as_tensor(normalize.normalize_obs(o.cpu().numpy())) for o in observations]
        now, after = observations[0].to(self.device), observations[-1].to(self.device)
        return now, self._actions[which].to(self.device), after, self._terminated[which].to(self.device)

    def sample(self, n: int, normalize: VecNormalize | None = None, next_observations: bool = True) -> Batch:
        """Draw n transitions uniformly with PyTorch's generator; see :meth:`get`."""
        return self.get(th.randint(len(self), (n,)), normalize, next_observations)

    def begin_statistics(self, normalize: VecNormalize | None) -> None:
        """Give a wrapper that has seen no observation yet the mean and variance of these."""
        begin_statistics(normalize, lambda i: self.get(th.from_numpy(i), None, False)[0].cpu().numpy(), len(self))


def load_trajectories(demonstrations: DemonstrationsLike, env: gym.Env[Any, Any] | VecEnv) -> list[Trajectory]:
    """
    Read demonstrations as trajectories for the ``imitation`` library's own algorithms.

    :param demonstrations: what :class:`~sb3_ext.gail.GAIL` takes
    :param env: environment that they shall fit; frames are stacked as it shows them, for which it is reset
    :return: the trajectories; unlike those of ``imitation.data.rollout``, ``terminal`` is False where a time limit
        ended the episode
    :raises DatasetError: if they are damaged, invalid or of another environment
    :raises TypeError: if they are of no known kind
    """
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    found = Demonstrations(demonstrations, venv.observation_space, venv.action_space, venv)
    return [
        Trajectory(stack_episode(d.observations, found.frame_stack, found.padding_type), d.actions, None, d.terminated)
        for d in found.trajectories
    ]


def check_observations_of(space: spaces.Space[Any] | None) -> None:
    """Refuse an environment, if its observations are known, that shows anything but arrays."""
    if space is not None and not isinstance(space, spaces.Box):
        raise TypeError(
            f"GAIL needs Box observations, the environment has {short_space(space)}; wrap it: "
            "sb3_ext.data.TransformedEnv(env, 'flatten'). The demonstrations follow."
        )


def _read(
    demonstrations: Any, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], env: VecEnv | None
) -> tuple[str, list[Demonstration], spaces.Space[Any]]:
    """Name, episodes and space of their observations."""
    check_observations_of(observation_space)
    assert isinstance(observation_space, spaces.Box)
    if isinstance(demonstrations, (minari.MinariDataset, str, os.PathLike)):
        return _read_minari(demonstrations, observation_space, action_space, env)
    space = observation_space
    if isinstance(demonstrations, ReplayBuffer):
        name, found = "the replay buffer", _split_buffer(demonstrations)
    elif _all_are(Trajectory, demonstrations):
        limit = getattr(_spec(env), "max_episode_steps", None)
        name, found = "the trajectories", [_from_imitation(d, limit) for d in demonstrations]
    elif _all_are(Episode, demonstrations):
        name, found = "the episodes", [Demonstration(d.observations, d.actions, d.terminated) for d in demonstrations]
        first = found[0].observations
        if first.dtype == np.uint8 and is_frame_space(observation_space):  # frames as they were recorded
            space = spaces.Box(0, 255, first.shape[1:], np.uint8)
    else:
        empty = isinstance(demonstrations, Sequence) and not demonstrations
        raise TypeError(
            "Demonstrations are a Minari dataset (object, id or path), imitation trajectories, episodes of "
            "sb3_ext.data.collect_episodes, or an SB3 ReplayBuffer; got "
            f"{'nothing' if empty else type(demonstrations).__name__}."
        )
    return name, _check(name, found, space, action_space), space


def _all_are(kind: type, demonstrations: Any) -> bool:
    some = isinstance(demonstrations, Sequence) and len(demonstrations) > 0
    return some and all(isinstance(d, kind) for d in demonstrations)


def _read_minari(
    dataset: DatasetLike, observation_space: spaces.Box, action_space: spaces.Space[Any], env: VecEnv | None
) -> tuple[str, list[Demonstration], spaces.Space[Any]]:
    source = open_for_agent(dataset, observation_space, transforms_of(env))
    check_same_actions(source.name, source.action_space, action_space)
    frames_per_observation(source.name, source.observation_space, observation_space)
    theirs, ours = (env_spec(source.metadata) or {}).get("id"), getattr(_spec(env), "id", None)
    found = [Demonstration(e.observations, e.actions, e.terminated) for e in source.read_all()]
    source.warn()
    if theirs and ours and theirs != ours:
        message = f"{source.name} was made in {theirs}, the environment to train in is {ours}; their spaces agree."
        warnings.warn(message, stacklevel=2)
    return source.name, found, source.observation_space


def _spec(env: VecEnv | None) -> Any:
    return None if env is None or not env.has_attr("spec") else env.get_attr("spec", 0)[0]


def _from_imitation(trajectory: Trajectory, time_limit: int | None) -> Demonstration:
    """As imitation has it, which marks an episode that a time limit cut as terminal too."""
    if isinstance(trajectory.obs, DictObs):
        raise DatasetError("The trajectories have Dict observations; GAIL needs arrays.")
    last = {} if trajectory.infos is None else trajectory.infos[-1]
    truncated = last.get("TimeLimit.truncated", len(trajectory.acts) == time_limit)
    return Demonstration(np.asarray(trajectory.obs), trajectory.acts, trajectory.terminal and not truncated)


def _split_buffer(buffer: ReplayBuffer) -> list[Demonstration]:
    """Episodes of each environment's column, in the order in which they were added."""
    if isinstance(buffer, DictReplayBuffer):
        raise DatasetError("The replay buffer has Dict observations; GAIL needs arrays.")
    if not isinstance(getattr(buffer, "next_observations", None), np.ndarray):
        why = (
            "was made with optimize_memory_usage=True, which loses the last observation of every episode"
            if type(buffer) is ReplayBuffer
            else f"is a {type(buffer).__name__}, not SB3's ReplayBuffer"
        )
        raise DatasetError(f"The replay buffer {why}; record episodes of the agent with sb3_ext.record instead.")
    order = np.roll(np.arange(buffer.size()), -buffer.pos if buffer.full else 0)
    found = []
    for column in range(buffer.n_envs):
        dones = buffer.dones[order, column] > 0
        starts = [0, *(np.flatnonzero(dones[:-1]) + 1).tolist(), len(order)]
        for a, b in pairwise(starts):
            rows = order[a:b]
            last = buffer.next_observations[rows[-1:], column]
            observations = np.concatenate([buffer.observations[rows, column], last])
            terminated = bool(dones[b - 1]) and not buffer.timeouts[rows[-1], column]
            actions = _environment_actions(buffer.actions[rows, column], buffer.action_space)
            found.append(Demonstration(observations, actions, terminated, from_start=a > 0 or not buffer.full))
    return found


def _environment_actions(actions: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    """Actions as the environment gets them: SB3's off-policy algorithms store continuous ones scaled to -1 to 1."""
    if isinstance(space, spaces.Box) and space.is_bounded():
        found: NDArray[Any] = unscaled(actions.reshape(-1, *space.shape), space.low, space.high).astype(space.dtype)
        return found
    return actions.reshape(-1) if isinstance(space, spaces.Discrete) else actions


def _check(
    name: str, found: list[Demonstration], observation_space: spaces.Box, action_space: spaces.Space[Any]
) -> list[Demonstration]:
    """The checks that a dataset went through when it was read."""
    if not isinstance(action_space, (spaces.Discrete, spaces.Box)):
        raise DatasetError(f"{name}: the environment's actions are {action_space}; Discrete and Box are supported.")
    checked = []
    for number, d in enumerate(found):
        where = f"{name}, episode {number}"
        observations = check_observations(d.observations, observation_space, where)
        checked.append(replace(d, observations=observations, actions=check_actions(d.actions, action_space, where)))
    return checked
