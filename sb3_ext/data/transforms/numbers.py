"""Transforms of actions and rewards."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.transforms.base import Transform
from sb3_ext.data.trees import short_space


class ClipActions(Transform):
    """
    Actions outside their bounds to the nearest bound, where they are recorded and where they are taken.

    :param bounds: the lower and the upper one, for actions that have none or wider ones
    """

    clips_actions = True

    def __init__(self, *bounds: str) -> None:
        self._words = bounds
        try:
            self._given = [float(bound) for bound in bounds]
        except ValueError:
            self._given = [math.nan]
        if self._given and not (len(self._given) == 2 and -math.inf < self._given[0] < self._given[1] < math.inf):
            raise DatasetError(f"transform {self}: needs two bounds, the lower one first, as in 'clip_actions:-1,1'.")

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        if not isinstance(action_space, spaces.Box):
            raise DatasetError(f"transform clip_actions needs Box actions, they are {short_space(action_space)}.")
        if self._given:
            low, high = np.maximum(action_space.low, self._given[0]), np.minimum(action_space.high, self._given[1])
            action_space = spaces.Box(low, high, dtype=action_space.dtype.type)
        self._bounds = action_space.low, action_space.high
        return space, action_space

    def actions(self, actions: NDArray[Any]) -> NDArray[Any]:
        """See :meth:`Transform.actions`."""
        clipped: NDArray[Any] = np.clip(actions, *self._bounds)
        return clipped

    def environment_actions(self, action: Any) -> Any:
        """See :meth:`Transform.environment_actions`."""
        return np.clip(action, *self._bounds)

    def __str__(self) -> str:
        return f"clip_actions:{','.join(self._words)}" if self._words else "clip_actions"


class ChangeReward(Transform):
    """``scale * reward``, ``reward + shift``, or the reward clipped to ``[low, high]``, by the name's second half."""

    _COUNT: ClassVar = {"scale": (1,), "shift": (1,), "clip": (1, 2)}

    def __init__(self, how: str, *numbers: str) -> None:
        self.how, self._words = how, numbers
        try:
            self.numbers = [float(number) for number in numbers]
        except ValueError:
            self.numbers = []
        if len(self.numbers) not in self._COUNT[how] or not np.isfinite(self.numbers).all():
            example = {"scale": "0.1", "shift": "-1", "clip": "-1,1"}[how]
            raise DatasetError(f"transform {self}: needs a number, as in 'reward_{how}:{example}'.")
        if how == "clip":
            low, high = (-abs(self.numbers[0]), abs(self.numbers[0])) if len(self.numbers) == 1 else self.numbers
            if low > high:
                raise DatasetError(f"transform {self}: the lower bound comes first.")
            self.numbers = [low, high]

    def rewards(self, rewards: NDArray[Any]) -> NDArray[Any]:
        """See :meth:`Transform.rewards`."""
        if self.how == "clip":
            clipped: NDArray[Any] = np.clip(rewards, self.numbers[0], self.numbers[1])
            return clipped
        return rewards * self.numbers[0] if self.how == "scale" else rewards + self.numbers[0]

    def __str__(self) -> str:
        return f"reward_{self.how}:{','.join(self._words)}"
