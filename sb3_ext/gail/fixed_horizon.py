"""Episodes whose length tells nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


class FixedHorizon(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """
    Make every episode ``horizon`` steps long: after its real end the last observation is shown with reward 0.

    Where the end of an episode says how well it went, its length alone can teach an imitator the task, or mislead it;
    with this wrapper it can do neither. The last step is a truncation. Wrap it in
    ``gymnasium.wrappers.TimeAwareObservation`` if the policy shall know how much time is left.

    :param env: the environment
    :param horizon: steps per episode
    :raises ValueError: if ``horizon`` is less than 1
    """

    def __init__(self, env: gym.Env[Any, Any], horizon: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, horizon=horizon)
        gym.Wrapper.__init__(self, env)
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}.")
        self.horizon = horizon

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._steps, self._over = 0, False
        self._observation, info = self.env.reset(**kwargs)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, or stand still once the real episode is over."""
        self._steps += 1
        reward, info = 0.0, {"over": True}
        if not self._over:
            self._observation, given, terminated, truncated, info = self.env.step(action)
            reward, self._over = float(given), terminated or truncated
        return self._observation, reward, False, self._steps >= self.horizon, info
