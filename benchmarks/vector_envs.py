"""Small environments with vectors as observations: tables one-hot, MinAtar flattened, torques in a few steps."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import learning_envs
import numpy as np
from gymnasium import spaces


class OneHot(gym.ObservationWrapper):
    """
    An environment with numbered states that shows them as one-hot vectors.

    :param env_id: the environment
    :param kwargs: its arguments
    """

    def __init__(self, env_id: str, **kwargs: Any) -> None:
        super().__init__(gym.make(env_id, max_episode_steps=-1, disable_env_checker=True, **kwargs))
        self.observation_space = spaces.Box(0, 1, (int(self.env.observation_space.n),), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        """Make the vector."""
        vector = np.zeros(self.observation_space.shape, np.float32)
        vector[int(observation)] = 1
        return vector


class FlatMinAtar(gym.ObservationWrapper):
    """
    A MinAtar game as a vector of zeros and ones.

    :param game: see :class:`learning_envs.MinAtar`
    """

    def __init__(self, game: str) -> None:
        super().__init__(learning_envs.MinAtar(game))
        self.observation_space = spaces.Box(0, 1, (self.env.observation_space.low.size,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Flatten."""
        return observation.astype(np.float32).ravel()


class Torques(gym.ActionWrapper):
    """
    An environment with one continuous action, of which it takes a few evenly spaced values.

    :param env_id: the environment
    :param n: number of values
    """

    def __init__(self, env_id: str, n: int) -> None:
        super().__init__(gym.make(env_id, max_episode_steps=-1, disable_env_checker=True))
        low, high = self.env.action_space.low[0], self.env.action_space.high[0]
        self.values = np.linspace(low, high, n, dtype=np.float32)
        self.action_space = spaces.Discrete(n)

    def action(self, action: int) -> np.ndarray:
        """Look up the torque."""
        return self.values[int(action) : int(action) + 1]


def register(name: str, entry: str, steps: int, **kwargs: Any) -> None:
    """Register an environment of this file."""
    gym.register(name, f"vector_envs:{entry}", max_episode_steps=steps, kwargs=kwargs)


register("FrozenLakeOneHot-v0", "OneHot", 100, env_id="FrozenLake-v1")
register("TaxiOneHot-v0", "OneHot", 200, env_id="Taxi-v4")
register("AsterixFlat-v0", "FlatMinAtar", 1000, game="asterix")
register("SpaceInvadersFlat-v0", "FlatMinAtar", 1000, game="space_invaders")
register("PendulumTorques-v0", "Torques", 200, env_id="Pendulum-v1", n=5)
