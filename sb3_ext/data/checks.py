"""What a dataset must fulfil before any training starts; every message names the place and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.envs import is_frame_space, padding_shown_by, to_channel_first
from sb3_ext.replay.frames import split_stacks

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

_LARGEST = np.finfo(np.float32).max
ActionSpace: TypeAlias = spaces.Discrete | spaces.Box
_DROP = "Drop the episode with dataset.filter_episodes(...)."
_RECORD_FRAMES = "record single frames, which are stacked as the environment does it."


class DatasetError(ValueError):
    """The dataset is missing, damaged, or not of the kind that is needed."""


@dataclass(frozen=True)
class CheckedEpisode:
    """
    An episode of T steps that passed all checks.

    Observations are ``[T + 1, *observation_shape]``, actions ``[T]`` or ``[T, *action_shape]``, rewards ``[T]``. Unless
    the last step ``terminated`` the task, the episode was cut.
    """

    observations: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminated: bool


def check_same_actions(name: str, recorded: spaces.Space[Any], agent: spaces.Space[Any]) -> None:
    """Refuse a dataset whose actions are not the agent's; bounds may differ by rounding."""
    if isinstance(recorded, spaces.Discrete) and isinstance(agent, spaces.Discrete):
        same = bool(recorded.n == agent.n)
    elif isinstance(recorded, spaces.Box) and isinstance(agent, spaces.Box):
        same = recorded.shape == agent.shape
        same = same and np.allclose(recorded.low, agent.low) and np.allclose(recorded.high, agent.high)
    else:
        same = False
    if not same:
        raise DatasetError(
            f"{name} is of another environment: its actions are {recorded}, those of the environment to train in "
            f"{agent}."
        )


def frames_per_observation(name: str, recorded: spaces.Space[Any], agent: spaces.Space[Any]) -> int:
    """
    Count the recorded observations that an agent sees at once, which may be stacks along its first axis.

    :raises DatasetError: if the agent's observations cannot be made of recorded ones
    """
    assert recorded.shape is not None
    assert agent.shape is not None
    if recorded.shape == agent.shape:
        return 1
    hint = ""
    if is_frame_space(recorded) and is_frame_space(agent):
        channels, *size = to_channel_first(np.empty(recorded.shape, np.uint8), recorded).shape
        if list(agent.shape[1:]) == size and agent.shape[0] % channels == 0:
            return int(agent.shape[0] // channels)
        hint = " Pictures must be channel first in the environment, with a whole number of recorded frames in a stack."
    raise DatasetError(
        f"{name} is of another environment, or recorded through other wrappers: its observations have shape "
        f"{recorded.shape}, those of the environment to train in {agent.shape}.{hint}"
    )


def ready_made_frames(space: spaces.Space[Any], frame_stack: int | None = None) -> int:
    """
    Frames per recorded observation if those may be ready-made stacks, else 1.

    Unless the user gives a ``frame_stack``, each channel is a frame, unless there are 3.
    """
    assert space.shape is not None
    channels = int(to_channel_first(np.empty(space.shape, np.uint8), space).shape[0]) if is_frame_space(space) else 1
    if frame_stack is None:
        return channels if channels != 3 else 1
    return frame_stack if channels % frame_stack == 0 else 1


_BEFORE = {"zero": "zeros", "reset": "the first frame again"}


def _other_padding(name: str, where: str, ours: str, shown: frozenset[str], n_frames: int, remedy: str) -> None:
    """Warn if the environment shows no padding type, which nothing mends; else raise."""
    if not shown:
        warnings.warn(
            f"Before an episode's first frame, the stacks of {name} have {_BEFORE[ours]}, those of the environment "
            f"neither zeros nor the first frame again: the first {n_frames - 1} observations of an episode differ.",
            stacklevel=3,
        )
        return
    (other,) = shown
    raise DatasetError(
        f"{where} begins an episode otherwise than the environment: before its first frame, the dataset's stacks have "
        f"{_BEFORE[ours]} (padding_type={ours!r}), the environment's have {_BEFORE[other]} "
        f"(padding_type={other!r}). Build the environment's stacks with StackFrames(env, {n_frames}, "
        f"padding_type={ours!r}) around its single frames, or {remedy}"
    )


def choose_padding(name: str, shown: frozenset[str], n_frames: int) -> str:
    """
    Choose what stands before the first of recorded single frames, so that their stacks are the environment's.

    Given what :func:`~sb3_ext.data.envs.padding_shown_by` found, it is ``"zero"`` if nothing speaks against it, with a
    warning if the environment shows no padding type.
    """
    if not shown:
        _other_padding(name, name, "zero", shown, n_frames, "")
    return "reset" if shown == {"reset"} else "zero"


def check_padding(name: str, padding_type: str, venv: VecEnv, n_frames: int, recorded: bool = False) -> None:
    """
    Refuse frame stacks that begin an episode otherwise than the environment's, which is reset if ``n_frames`` > 1.

    An environment that shows no padding type only gets a warning. If the stacks were ``recorded`` as such, only the
    environment can change.
    """
    shown = padding_shown_by(venv, n_frames)
    if padding_type in shown:
        return
    other = "".join(shown)
    remedy = (
        f"load the dataset with padding_type={other!r}: load_minari(..., padding_type={other!r}), or "
        f"CQL(..., dataset_kwargs={{'padding_type': {other!r}}})."
    )
    _other_padding(name, name, padding_type, shown, n_frames, _RECORD_FRAMES if recorded else remedy)


def check_recorded_padding(
    name: str, number: int, observations: NDArray[Any], n_frames: int, shown: frozenset[str]
) -> None:
    """
    Refuse recorded frame stacks of one episode that begin otherwise than what the environment has ``shown``.

    ``observations`` are the whole episode's, channel first, ``[T + 1, k * C, ...]``, and left alone if they are no
    stacks of ``n_frames`` k. An environment that shows no padding type only gets a warning.
    """
    parts = split_stacks(observations, n_frames)
    if parts is not None and not parts[1] & shown:
        ours = "zero" if "zero" in parts[1] else "reset"
        _other_padding(name, f"{name}, episode {number},", ours, shown, n_frames, _RECORD_FRAMES)


def check_spaces(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], name: str, continuous: bool = False
) -> tuple[spaces.Box, ActionSpace]:
    """
    Accept ``Box`` observations with at least one dimension and ``Discrete`` actions that start at 0.

    ``continuous`` accepts ``Box`` actions as well.
    """
    if not isinstance(observation_space, spaces.Box) or not observation_space.shape:
        raise DatasetError(
            f"{name}: observation_space is {observation_space}; vectors and images (Box) are supported. Record the "
            "dataset through a wrapper that gives a Box (gymnasium.wrappers.FlattenObservation for instance)."
        )
    if continuous and isinstance(action_space, spaces.Box) and action_space.shape:
        return observation_space, action_space
    if not isinstance(action_space, spaces.Discrete):
        raise DatasetError(
            f"{name}: action_space is {action_space}; Discrete actions are supported. Discretise continuous ones in a "
            "wrapper before recording."
        )
    if action_space.start != 0:
        raise DatasetError(
            f"{name}: action_space is {action_space}; SB3 counts actions from 0. Record again through a wrapper that "
            f"shifts them by {-int(action_space.start)} to Discrete({action_space.n})."
        )
    return observation_space, action_space


def _refuse(bad: NDArray[np.bool_], where: str, why: Callable[[int], str]) -> None:
    """Name the first bad step, if there is one, and say what is wrong with it."""
    if bad.any():
        step = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        raise DatasetError(f"{where}, step {step}: {why(step)}")


def check_observations(observations: NDArray[Any], space: spaces.Box, where: str) -> NDArray[Any]:
    """Check one episode's observations, ``[T + 1, ...]``, and convert them to the type of the dataset's space."""
    if observations.shape[1:] != space.shape:
        raise DatasetError(
            f"{where}: observations have shape {observations.shape[1:]}, the dataset's observation_space says "
            f"{space.shape}."
        )
    if observations.dtype.kind == "f":
        bad = ~(np.abs(observations) <= _LARGEST)
        _refuse(bad, where, lambda step: f"the observation has NaN, infinite or too large values. {_DROP}")
    if observations.dtype == space.dtype:
        return observations
    converted = observations.astype(space.dtype)
    if converted.dtype.kind != "f":
        why = (
            f"observations are stored as {observations.dtype} and do not fit the observation_space's {space.dtype}. "
            "Record the dataset again."
        )
        _refuse(converted != observations, where, lambda step: why)
    return converted


def check_actions(actions: NDArray[Any], action_space: ActionSpace, where: str) -> NDArray[Any]:
    """Check one episode's actions, ``[T]`` or ``[T, ...]``, and convert them to int64 or the space's type."""
    if isinstance(action_space, spaces.Box):
        if actions.shape[1:] != action_space.shape:
            raise DatasetError(
                f"{where}: actions have shape {actions.shape[1:]}, the dataset's action_space says "
                f"{action_space.shape}."
            )
        slack = 1e-5 * np.maximum(np.abs(np.stack([action_space.low, action_space.high])), 1)  # a float32's rounding
        outside = ~((actions >= action_space.low - slack[0]) & (actions <= action_space.high + slack[1]))  # NaN too
        _refuse(outside, where, lambda step: f"action {actions[step]} is outside {action_space}. {_DROP}")
        return actions.astype(action_space.dtype)
    flat = actions.reshape(-1)
    if flat.dtype.kind not in "iub":
        broken = ~(np.isfinite(flat) & (flat == np.round(flat)))
        _refuse(broken, where, lambda step: f"action {flat[step]} is no whole number. {_DROP}")
    whole = flat.astype(np.int64)
    outside = (whole < 0) | (whole >= action_space.n)
    _refuse(outside, where, lambda step: f"action {whole[step]} is outside Discrete({action_space.n}). {_DROP}")
    return whole


def check_episode(
    episode: dict[str, Any],
    index: int,
    name: str,
    observation_space: spaces.Box,
    action_space: ActionSpace,
    strict: bool = True,
) -> CheckedEpisode:
    """
    Check one episode as Minari's storages give it; errors name its number ``index`` and the step.

    Unless ``strict``, one-step episodes are accepted, and termination wins over truncation.
    """
    where = f"{name}, episode {index}"
    rewards = np.asarray(episode["rewards"]).reshape(-1)
    observations, actions = np.asarray(episode["observations"]), np.asarray(episode["actions"])
    terminations = np.asarray(episode["terminations"], bool).reshape(-1)
    truncations = np.asarray(episode["truncations"], bool).reshape(-1)
    steps = len(rewards)
    if steps == 0:
        raise DatasetError(f"{where} has no step. Drop it with dataset.filter_episodes(lambda e: len(e) > 0).")
    if steps == 1 and strict:
        raise DatasetError(
            f"{where} has one step only, which is often an artefact of recording. Pass strict=False if it is meant, or "
            "drop it with dataset.filter_episodes(lambda e: len(e) > 1)."
        )
    sizes = {
        "observations": (len(observations), steps + 1),
        "actions": (len(actions) if isinstance(action_space, spaces.Box) else actions.size, steps),
        "terminations": (len(terminations), steps),
        "truncations": (len(truncations), steps),
    }
    for field, (found, wanted) in sizes.items():
        if found != wanted:
            raise DatasetError(
                f"{where}: {found} {field} for {steps} rewards, expected {wanted}. The episode was not stored whole."
            )
    _refuse(~(np.abs(rewards) <= _LARGEST), where, lambda step: f"the reward is {rewards[step]}. {_DROP}")
    observations = check_observations(observations, observation_space, where)
    actions = check_actions(actions, action_space, where)
    unclear = (
        "marked both terminated and truncated, so it is unclear whether to bootstrap. Pass strict=False to let "
        "termination win."
    )
    early = f"the episode ends here, but {steps} steps are stored. Store what follows as an episode of its own."
    _refuse(terminations & truncations & strict, where, lambda step: unclear)
    _refuse((terminations | truncations)[:-1], where, lambda step: early)
    return CheckedEpisode(observations, actions, rewards, bool(terminations[-1]))
