"""Transforms by name, in order, around data and around environments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.transforms.base import Transform
from sb3_ext.data.transforms.entries import AsStableBaselines, Choose, Flatten, Function, Tokens
from sb3_ext.data.transforms.numbers import ChangeReward, ClipActions
from sb3_ext.data.transforms.pictures import Atari, Grey, MaxPool, OneHot, Resize
from sb3_ext.data.trees import Observations, each, flat_observations, flat_space, joined, stacked

TransformLike: TypeAlias = str | Transform | Callable[[Any], Any]


_KINDS: dict[str, Callable[..., Transform]] = {
    "flatten": Flatten,
    "keep": lambda *keys: Choose(*keys, keep=True),
    "drop": lambda *keys: Choose(*keys, keep=False),
    "grey": Grey,
    "resize": Resize,
    "max_pool": MaxPool,
    "atari": Atari,
    "one_hot": OneHot,
    "tokens": Tokens,
    "clip_actions": ClipActions,
    "reward_scale": lambda *numbers: ChangeReward("scale", *numbers),
    "reward_shift": lambda *numbers: ChangeReward("shift", *numbers),
    "reward_clip": lambda *numbers: ChangeReward("clip", *numbers),
}
TRANSFORMS = tuple(_KINDS)
"""Names that can be given as text."""


def parse_transform(given: TransformLike) -> Transform:
    """
    Make a transform of ``name``, ``name:argument,argument`` or ``name:argument@entry``; or of a function.

    :raises DatasetError: if there is none of that name, or the arguments do not fit
    """
    if isinstance(given, Transform):
        return copy.deepcopy(given)
    if not isinstance(given, str):
        if callable(given):
            return Function(given)
        raise DatasetError(f"A transform is a name or a function, not {type(given).__name__}.")
    text, _, key = given.partition("@")
    name, _, arguments = text.partition(":")
    if name not in _KINDS:
        raise DatasetError(f"There is no transform {name!r}; there are {', '.join(TRANSFORMS)}, and functions.")
    words = [word.strip() for word in arguments.split(",")] if arguments else []
    try:
        return _KINDS[name](*words, **({"key": key} if key else {}))
    except TypeError as error:
        raise DatasetError(f"transform {given}: its arguments do not fit ({error}).") from error


class Pipeline:
    """
    Transforms in order, bound to the spaces of a dataset or of an environment.

    :param transforms: names, functions or transforms
    :param observation_space: as it was recorded, or as the environment has it
    :param action_space: likewise
    :param name: whose spaces they are, for messages
    :param texts: recorded observations, for a vocabulary; asked for at need
    :raises DatasetError: if one does not fit
    """

    def __init__(
        self,
        transforms: Sequence[TransformLike] | TransformLike | None,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        name: str,
        texts: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        given: list[Any] = [transforms]
        if transforms is None or isinstance(transforms, (list, tuple)):
            given = list(transforms or ())
        self._originals, self._given = given, [parse_transform(transform) for transform in given]
        self.recorded_space, self.recorded_actions = flat_space(observation_space), action_space
        last = AsStableBaselines()
        self._steps: list[Transform] = [*self._given, last]
        space, actions = self.recorded_space, action_space
        for step in self._steps:
            if isinstance(step, Tokens) and not step.fitted:
                if texts is None:
                    raise DatasetError(f"{name}: transform tokens has no vocabulary; take the transforms of a dataset.")
                step.fit(texts())
            try:
                space, actions = step.bind(space, actions)
            except DatasetError as error:
                raise DatasetError(f"{name}: {error}") from error
        self.observation_space, self.action_space = space, actions
        self.dropped_text = last.dropped
        self.clips_actions = any(step.clips_actions for step in self._given)

    @property
    def names(self) -> list[Any]:
        """What to give to get the same transforms again: text, or the user's own objects."""
        pairs = zip(self._originals, self._given, strict=True)
        return [str(step) if isinstance(given, str) or isinstance(step, Tokens) else given for given, step in pairs]

    @property
    def changes_nothing(self) -> bool:
        """Whether everything is used as it was recorded."""
        same = self.observation_space == self.recorded_space and self.action_space == self.recorded_actions
        return not self._given and same

    def observations(self, observations: Observations) -> Observations:
        """Observations of one episode from its start, ``[n, ...]``, flat."""
        for step in self._steps:
            observations = step.observations(observations)
        return observations

    def actions(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Recorded actions, ``[n, ...]``."""
        for step in self._steps:
            actions = step.actions(actions)
        return actions

    def rewards(self, rewards: NDArray[Any]) -> NDArray[Any]:
        """Rewards ``[n]``."""
        for step in self._steps:
            rewards = step.rewards(rewards)
        return rewards

    def environment_actions(self, action: Any) -> Any:
        """One action of the agent's for the environment."""
        for step in reversed(self._steps):
            action = step.environment_actions(action)
        return action

    def steps(self) -> Iterator[Transform]:
        """Go through them in order."""
        return iter(self._steps)


def transforms_of(env: Any) -> list[Any] | None:
    """Transforms that the first of some vectorised environments goes through, see :class:`TransformedEnv`, or None."""
    if env is None or not env.has_attr("dataset_transforms"):
        return None
    found: list[Any] = env.get_attr("dataset_transforms", 0)[0]
    return found


class TransformedEnv(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """
    An environment through the transforms of a dataset, so that an agent sees there what it learnt from.

    :param env: the environment as the data was recorded in it
    :param transforms: as in :func:`~sb3_ext.load_minari`; of a trained model they are
        ``model.dataset_info["transforms"]``
    :raises DatasetError: if one does not fit
    """

    def __init__(self, env: gym.Env[Any, Any], transforms: Sequence[TransformLike] | TransformLike) -> None:
        gym.Wrapper.__init__(self, env)
        name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self._pipeline = Pipeline(transforms, env.observation_space, env.action_space, name)
        self.observation_space, self.action_space = self._pipeline.observation_space, self._pipeline.action_space
        self.dataset_transforms = self._pipeline.names
        gym.utils.RecordConstructorArgs.__init__(self, transforms=self.dataset_transforms)
        self._before: list[list[Any]] = []

    def _see(self, observation: Any) -> Any:
        now = flat_observations(stacked([observation]), self.env.observation_space)
        for step, before in zip(self._pipeline.steps(), self._before, strict=True):
            if step.reach == 0:
                now = step.observations(now)
                continue
            before.append(now)
            del before[: -1 - step.reach]
            now = each(step.observations(joined(before)), lambda x: x[-1:])
        return each(now, lambda x: x[0])

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(**kwargs)
        self._before = [[] for _ in self._pipeline.steps()]
        return self._see(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step."""
        taken = self._pipeline.environment_actions(action)
        observation, reward, terminated, truncated, info = self.env.step(taken)
        (changed,) = self._pipeline.rewards(np.array([float(reward)]))
        return self._see(observation), float(changed), terminated, truncated, info
