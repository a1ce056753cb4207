"""Small environments for learning benchmarks: Catch on 84x84 pixels, and MinAtar as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from minatar import Environment
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class Catch(gym.Env):
    """
    A ball falls ten rows, a paddle moves left, stays, or moves right; +1 if it is under the ball at the end, else -1.

    Observations are single 84x84 grey frames; after nine steps the episode terminates.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (84, 84), np.uint8)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Drop a new ball."""
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(10)), int(self.np_random.integers(10))
        return self._draw(), {}

    def _draw(self) -> np.ndarray:
        frame = np.zeros((84, 84), np.uint8)
        frame[self.row * 8 : self.row * 8 + 8, self.ball * 8 : self.ball * 8 + 8] = 255
        frame[76:84, max(0, self.paddle * 8 - 4) : self.paddle * 8 + 12] = 180
        return frame

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move the paddle, let the ball fall one row."""
        self.paddle = int(np.clip(self.paddle + action - 1, 0, 9))
        self.row += 1
        done = self.row == 9
        reward = (1.0 if self.paddle == self.ball else -1.0) if done else 0.0
        return self._draw(), reward, done, False, {}


class MinAtar(gym.Env):
    """
    A MinAtar game (Young and Tian, 2019) with its minimal action set, sticky actions 0.1 and difficulty ramping.

    :param game: ``"breakout"``, ``"asterix"``, ``"freeway"``, ``"seaquest"`` or ``"space_invaders"``
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, game: str = "breakout") -> None:
        self.game = Environment(game)
        self.actions = self.game.minimal_action_set()
        height, width, channels = self.game.state_shape()
        self.observation_space = spaces.Box(0, 1, (channels, height, width), np.uint8)
        self.action_space = spaces.Discrete(len(self.actions))

    def _observe(self) -> np.ndarray:
        return np.moveaxis(self.game.state(), -1, 0).astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start a game."""
        super().reset(seed=seed)
        if seed is not None:
            self.game.seed(seed)
        self.game.reset()
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Play one frame."""
        reward, done = self.game.act(self.actions[int(action)])
        return self._observe(), float(reward), bool(done), False, {}


class MinAtarCNN(BaseFeaturesExtractor):
    """Network of the MinAtar paper: one 3x3 convolution with 16 channels, 128 hidden units."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=128)
        channels = observation_space.shape[0]
        self.layers = th.nn.Sequential(
            th.nn.Conv2d(channels, 16, 3), th.nn.ReLU(), th.nn.Flatten(), th.nn.Linear(1024, 128), th.nn.ReLU()
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map ``[B, C, 10, 10]`` to ``[B, 128]``."""
        return self.layers(observations)


class SmallCNN(BaseFeaturesExtractor):
    """The network of Mnih et al. (2013) for Atari frames: a third of the cost of SB3's default."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=256)
        self.layers = th.nn.Sequential(
            *(th.nn.Conv2d(observation_space.shape[0], 16, 8, 4), th.nn.ReLU(), th.nn.Conv2d(16, 32, 4, 2)),
            *(th.nn.ReLU(), th.nn.Flatten(), th.nn.Linear(2592, 256), th.nn.ReLU()),
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map ``[B, 4, 84, 84]`` to ``[B, 256]``."""
        return self.layers(observations)


gym.register("Catch-v0", entry_point="learning_envs:Catch")
gym.register("MinAtarBreakout-v0", entry_point="learning_envs:MinAtar", max_episode_steps=5000)
