"""Parts that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_ext.efficientzero.policies import MlpPolicy
from sb3_ext.efficientzero.replay import SequenceReplayBuffer


def flags(steps: int, terminated: bool | None) -> dict[str, Any]:
    """Termination and truncation flags of an episode; None: neither at the end, as if it was cut."""
    terminations, truncations = np.zeros(steps, bool), np.zeros(steps, bool)
    if terminated is not None:
        (terminations if terminated else truncations)[-1:] = True
    return {"terminations": terminations, "truncations": truncations}


MakeDataset = Callable[..., minari.MinariDataset]


SMALL: dict[str, Any] = {
    "learning_starts": 20,
    "batch_size": 8,
    "num_simulations": 4,
    "buffer_size": 500,
    "device": "cpu",
    "policy_kwargs": {"network_kwargs": {"latent_size": 16, "projection_size": 16}},
}


TINY_CNN = {"network_kwargs": {"channels": 8, "head_channels": 4, "head_size": 8, "projection_size": 16}}


def fill(n_envs: int, steps: int, size: int = 64, length: int = 4) -> tuple[SequenceReplayBuffer, list[list[Any]]]:
    """A buffer of numbered observations, and the episodes that went in, per environment."""
    space, actions = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(3)
    buffer = SequenceReplayBuffer(size, space, actions, "cpu", n_envs, length=length)
    rng = np.random.default_rng(0)
    episodes: list[list[Any]] = [[] for _ in range(n_envs)]
    obs = rng.normal(size=(n_envs, 2)).astype(np.float32)
    for _ in range(steps):
        action, reward = rng.integers(3, size=(n_envs, 1)), rng.normal(size=n_envs)
        done, cut = rng.random(n_envs) < 0.25, rng.random(n_envs) < 0.5
        following = rng.normal(size=(n_envs, 2)).astype(np.float32)
        infos = [{"TimeLimit.truncated": bool(d and c)} for d, c in zip(done, cut, strict=True)]
        buffer.add(obs, following, action, reward, done, infos)
        for env in range(n_envs):
            episodes[env].append(
                (obs[env], action[env], reward[env], following[env], done[env], done[env] and not cut[env])
            )
        fresh = rng.normal(size=(n_envs, 2)).astype(np.float32)
        obs = np.where(done[:, None], fresh, following)
    return buffer, episodes


def randomize(policy: MlpPolicy) -> None:
    """Heads start at zero: give them something to say."""
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(th.randn_like(parameter) * 0.2)


N = 5


class Masked(gym.Env[Any, Any]):
    """Walks in a circle of states; in state s only s and s + 1 (modulo N) are legal. An illegal action is an error."""

    def __init__(self, dead_at: int = -1) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (N,)), spaces.Discrete(N)
        self.dead_at, self.state, self.steps = dead_at, 0, 0

    def _observe(self) -> Any:
        return np.eye(N, dtype=np.float32)[self.state]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.steps = 0, 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        assert self.action_masks()[action], f"{action} in state {self.state}"
        self.steps += 1
        self.state = (self.state + 1 + int(action == self.state)) % N
        return self._observe(), float(action == self.state), self.steps == 9, self.steps == 7, {}

    def action_masks(self) -> Any:
        legal = np.zeros(N, bool)
        legal[[self.state, (self.state + 1) % N]] = self.steps != self.dead_at
        return legal


class Pixels(gym.Env[Any, Any]):
    """A bright square that action 1 keeps in place; terminates when it reaches the edge. One [36, 36] frame."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, continuous: bool = False) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (36, 36), np.uint8)
        self.action_space: spaces.Space[Any] = spaces.Box(-1, 1, (1,)) if continuous else spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 4
        return self._draw(), {}

    def _draw(self) -> np.ndarray:
        frame = np.zeros((36, 36), np.uint8)
        frame[self.place * 4 : self.place * 4 + 4] = 200
        return frame

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place += 1 - int(np.sum(action) > 0)
        return self._draw(), 1.0, self.place >= 8, False, {}


gym.register("Pixels-v0", entry_point=f"{__name__}:Pixels", max_episode_steps=30)
gym.register("ContinuousPixels-v0", entry_point=f"{__name__}:Pixels", max_episode_steps=30, kwargs={"continuous": True})


def published_loss(
    quantiles: np.ndarray, next_quantiles: np.ndarray, actions: np.ndarray, rewards: np.ndarray, dones: np.ndarray,
    gamma: float, alpha: float,
) -> float:  # fmt: skip
    """QR-DQN + CQL(H) of the authors' Atari code, element by element in float64; quantiles are ``[B, N, A]``."""
    total = 0.0
    batch, n, _ = quantiles.shape
    for b in range(batch):
        best = int(np.argmax([next_quantiles[b, :, a].mean() for a in range(next_quantiles.shape[2])]))
        target = rewards[b] + gamma * (1 - dones[b]) * next_quantiles[b, :, best]
        td = 0.0
        for i in range(n):
            for y in target:
                u = y - quantiles[b, i, actions[b]]
                huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                td += abs((i + 0.5) / n - (u < 0)) * huber / n
        q = quantiles[b].mean(axis=0)
        total += td + alpha * (np.log(np.exp(q).sum()) - q[actions[b]])
    return total / batch


class Ramp(gym.Env[Any, Any]):
    """
    Pictures of one brightness that grows by 1 per step, for 9 steps; options may set the first one.

    :param start: the first brightness; None draws it from 50 to 149
    :param side: of the picture
    """

    action_space = spaces.Discrete(2)

    def __init__(self, start: int | None = 100, side: int = 36) -> None:
        self.observation_space = spaces.Box(0, 255, (side, side), np.uint8)
        self.start, self.resets = start, 0

    def _draw(self) -> Any:
        return np.full(self.observation_space.shape, self.first + self.steps, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.resets, self.steps = self.resets + 1, 0
        self.first = int(self.np_random.integers(50, 150)) if self.start is None else self.start
        self.first = (options or {}).get("first", self.first)
        return self._draw(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._draw(), 0.0, self.steps == 9, False, {}


gym.register("Ramp-v0", entry_point=f"{__name__}:Ramp")


def filled_buffer(observations: spaces.Space[Any], actions: spaces.Space[Any], steps: int = 50) -> ReplayBuffer:
    """A replay buffer of transitions that are drawn from the spaces."""
    kind = DictReplayBuffer if isinstance(observations, spaces.Dict) else ReplayBuffer
    buffer = kind(steps, observations, actions, "cpu", handle_timeout_termination=False)
    observations.seed(0)
    actions.seed(0)
    batched = (lambda x: {k: np.array(v)[None] for k, v in x.items()}) if kind is DictReplayBuffer else (
        lambda x: np.array(x)[None]
    )  # fmt: skip
    for _ in range(steps):
        now, then = batched(observations.sample()), batched(observations.sample())
        buffer.add(now, then, np.array(actions.sample())[None], np.zeros(1), np.zeros(1), [{}])
    return buffer
