"""What a dataset must fulfil before any training starts; every message names the place and the remedy."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.envs import is_frame_space, padding_shown_by, to_channel_first
from sb3_ext.data.trees import flat_observations, flat_space, leaves, short_space
from sb3_ext.replay.frames import split_stacks

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

_LARGEST = np.finfo(np.float32).max
ActionSpace: TypeAlias = spaces.Discrete | spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary
_DROP = "Drop the episode with dataset.filter_episodes(...)."
_RECORD_FRAMES = "record single frames, which are stacked as the environment does it."


class DatasetError(ValueError):
    """The dataset is missing, damaged, or not of the kind that is needed."""


@dataclass(frozen=True)
class CheckedEpisode:
    """
    An episode of T steps that passed all checks.

    Observations are ``[T + 1, *observation_shape]``, one such array per entry of a ``Dict`` space. Actions are ``[T]``
    or ``[T, *action_shape]``, rewards ``[T]``. Unless the last step ``terminated`` the task, the episode was cut.
    ``recorded_return`` is the sum of the rewards before any transform, as evaluations in the environment report it.
    """

    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminated: bool
    recorded_return: float


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
    if (
        isinstance(recorded, spaces.Dict)
        or isinstance(agent, spaces.Dict)
        or recorded.shape is None
        or agent.shape is None
    ):
        raise DatasetError(
            f"{name}: arrays are needed, the dataset has {short_space(recorded)}, the environment to train in "
            f"{short_space(agent)}. Wrap the environment, and the dataset follows: sb3_ext.data.TransformedEnv(env, "
            "'flatten')."
        )
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
    channels = len(to_channel_first(np.empty(space.shape or (), np.uint8), space)) if is_frame_space(space) else 1
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


def check_action_space(action_space: spaces.Space[Any], name: str) -> ActionSpace:
    """Accept the kinds of actions that SB3 knows."""
    if isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return action_space
    if isinstance(action_space, spaces.Box) and action_space.shape:
        return action_space
    raise DatasetError(
        f"{name}: action_space is {short_space(action_space)}. Nothing here learns such actions; Discrete, Box, "
        "MultiDiscrete and MultiBinary ones can be learnt."
    )


def _refuse(bad: NDArray[np.bool_], where: str, why: Callable[[int], str]) -> None:
    """Name the first bad step, if there is one, and say what is wrong with it."""
    if bad.any():
        step = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        raise DatasetError(f"{where}, step {step}: {why(step)}")


def check_observations(observations: Any, space: spaces.Space[Any], where: str) -> Any:
    """
    Check one episode's flat observations, ``[T + 1, ...]`` each, and convert them to the types of the dataset's space.

    Text becomes an array of strings. Kinds of spaces that nobody can learn from are left alone.
    """
    if isinstance(space, spaces.Dict):
        return {key: _check_entry(observations[key], entry, where, f"'s {key!r}") for key, entry in leaves(space)}
    return _check_entry(observations, space, where, "")


def _check_entry(given: Any, space: spaces.Space[Any], where: str, which: str) -> Any:
    """Check observations, or ``which`` of their entries."""
    if isinstance(space, spaces.Text):
        return np.array([str(text) for text in given], object)
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return given
    values, shape = np.asarray(given), space.shape or ()
    if values.ndim == 2 and values.shape[1] == 1 and not shape:
        values = values[:, 0]
    elif values.ndim == 1 and shape == (1,):
        values = values[:, None]
    if values.shape[1:] != shape:
        raise DatasetError(
            f"{where}: observations{which} have shape {values.shape[1:]}, the dataset's observation_space says {shape}."
        )
    if values.dtype.kind == "f":
        bad = ~(np.abs(values) <= _LARGEST)
        _refuse(bad, where, lambda step: f"the observation{which} has NaN, infinite or too large values. {_DROP}")
    if not isinstance(space, spaces.Box):
        return _check_counts(values, space, where, f"the observation{which}")
    if values.dtype == space.dtype:
        return values
    converted = values.astype(space.dtype)
    if converted.dtype.kind != "f":
        why = (
            f"observations{which} are stored as {values.dtype} and do not fit the observation_space's {space.dtype}. "
            "Record the dataset again."
        )
        _refuse(converted != values, where, lambda step: why)
    return converted


def _check_counts(
    values: NDArray[Any], space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, where: str, what: str
) -> NDArray[Any]:
    """Whole numbers, ``[T, ...]``, within a space of counts, as int64; for MultiBinary int8."""
    if values.dtype.kind not in "iub":
        broken = ~(np.isfinite(values) & (values == np.round(values)))
        _refuse(broken, where, lambda step: f"{what} {values[step]} is no whole number. {_DROP}")
    whole = values.astype(np.int64)
    low: Any = 0 if isinstance(space, spaces.MultiBinary) else space.start
    count: Any = 2 if isinstance(space, spaces.MultiBinary) else 0
    if not isinstance(space, spaces.MultiBinary):
        count = space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n
    outside = (whole < low) | (whole >= low + count)
    _refuse(outside, where, lambda step: f"{what} {whole[step]} is outside {space}. {_DROP}")
    return whole.astype(np.int8) if isinstance(space, spaces.MultiBinary) else whole


def check_actions(actions: NDArray[Any], action_space: ActionSpace, where: str, clip: bool = False) -> NDArray[Any]:
    """
    Check one episode's actions, ``[T]`` or ``[T, ...]``, and convert them to integers or the space's type.

    ``[T]`` is taken for ``[T, 1]``, and one-hot rows for the ``Discrete`` action they mean. ``clip`` leaves actions
    outside a box to those who clip them.
    """
    shape = action_space.shape or ()
    if isinstance(action_space, spaces.Discrete) and actions.shape[1:] == (int(action_space.n),) and action_space.n > 1:
        hot = (actions == 1).sum(axis=1) == 1
        _refuse(
            ~(hot & ((actions == 0).sum(axis=1) == action_space.n - 1)),
            where,
            lambda step: f"action {actions[step]} has {action_space.n} numbers and is not one-hot. {_DROP}",
        )
        actions = actions.argmax(axis=1) + int(action_space.start)
    elif isinstance(action_space, spaces.Discrete) and actions.shape[1:] == (1,):
        actions = actions[:, 0]
    elif actions.ndim == 1 and shape == (1,):
        actions = actions[:, None]
    if actions.shape[1:] != shape:
        raise DatasetError(f"{where}: actions have shape {actions.shape[1:]}, the dataset's action_space says {shape}.")
    if isinstance(action_space, spaces.Box):
        if clip:
            _refuse(~np.isfinite(actions), where, lambda step: f"action {actions[step]} is no number. {_DROP}")
            return actions.astype(action_space.dtype)
        outside = outside_bounds(actions, action_space)
        share = outside.reshape(len(outside), -1).any(axis=1).mean() if len(outside) else 0.0
        _refuse(
            outside,
            where,
            lambda step: (
                f"action {actions[step]} is outside {short_space(action_space)}, as are those of {share:.2%} "
                "of this episode's steps. Clip them with transforms=['clip_actions'] if they are only a little "
                f"outside. Otherwise: {_DROP}"
            ),
        )
        return actions.astype(action_space.dtype)
    return _check_counts(actions, action_space, where, "action")


def outside_bounds(actions: NDArray[Any], space: spaces.Box) -> NDArray[np.bool_]:
    """Which numbers of actions ``[T, ...]`` are not between their bounds, beyond a float32's rounding; NaN is not."""
    slack = 1e-5 * np.maximum(np.abs(np.stack([space.low, space.high])), 1)
    found: NDArray[np.bool_] = ~((actions >= space.low - slack[0]) & (actions <= space.high + slack[1]))
    return found


def check_episode(
    episode: dict[str, Any],
    index: int,
    name: str,
    observation_space: spaces.Space[Any],
    action_space: ActionSpace,
    strict: bool = False,
    clip: bool = False,
    notices: Counter[str] | None = None,
) -> CheckedEpisode:
    """
    Check one episode as Minari's storages give it; errors name its number ``index``, the step and the entry.

    Unless ``strict``, one-step episodes are accepted, and termination wins over truncation; ``notices`` counts both.
    The observations become flat, see :func:`~sb3_ext.data.trees.flat_space`.
    """
    where = f"{name}, episode {index}"
    notices = Counter() if notices is None else notices
    rewards = np.asarray(episode["rewards"]).reshape(-1)
    try:
        observations = flat_observations(episode["observations"], observation_space)
    except KeyError as error:
        raise DatasetError(
            f"{where}: observations have no entry {error.args[0]!r}, the dataset's observation_space has. {_DROP}"
        ) from error
    actions = np.asarray(episode["actions"])
    terminations = np.asarray(episode["terminations"], bool).reshape(-1)
    truncations = np.asarray(episode["truncations"], bool).reshape(-1)
    steps = len(rewards)
    if steps == 0:
        raise DatasetError(f"{where} has no step. Drop it with dataset.filter_episodes(lambda e: len(e) > 0).")
    if steps == 1:
        if strict:
            raise DatasetError(
                f"{where} has one step only, which is often an artefact of recording. Pass strict=False if it is "
                "meant, or drop it with dataset.filter_episodes(lambda e: len(e) > 1)."
            )
        notices["one step"] += 1
    entries = observations if isinstance(observations, dict) else {"": observations}
    sizes = {
        **{f"observations{f'[{key!r}]' if key else ''}": (len(x), steps + 1) for key, x in entries.items()},
        "actions": (len(actions), steps),
        "terminations": (len(terminations), steps),
        "truncations": (len(truncations), steps),
    }
    for field, (found, wanted) in sizes.items():
        if found != wanted:
            raise DatasetError(
                f"{where}: {found} {field} for {steps} rewards, expected {wanted}. The episode was not stored whole."
            )
    _refuse(~(np.abs(rewards) <= _LARGEST), where, lambda step: f"the reward is {rewards[step]}. {_DROP}")
    observations = check_observations(observations, flat_space(observation_space), where)
    actions = check_actions(actions, action_space, where, clip)
    both = terminations & truncations
    if both.any():
        unclear = (
            "marked both terminated and truncated, so it is unclear whether to bootstrap. Pass strict=False to let "
            "termination win."
        )
        _refuse(both & strict, where, lambda step: unclear)
        notices["both ends"] += 1
    early = f"the episode ends here, but {steps} steps are stored. Store what follows as an episode of its own."
    _refuse((terminations | truncations)[:-1], where, lambda step: early)
    recorded_return = float(rewards.sum(dtype=np.float64))
    return CheckedEpisode(observations, actions, rewards, bool(terminations[-1]), recorded_return)
