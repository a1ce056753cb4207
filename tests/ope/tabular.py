"""A small Markov decision process whose policies' values are known by linear algebra."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import DQN

STATES, ACTIONS, GAMMA = 6, 3, 0.9
END = STATES
"""The state after which an episode is over."""
_rng = np.random.default_rng(3)
TRANSITIONS: NDArray[np.float64] = _rng.dirichlet(np.full(STATES + 1, 0.3), (STATES, ACTIONS))
"""Probability of the next state, ``[S, A, S + 1]``; the last one is the end."""
REWARDS: NDArray[np.float64] = _rng.normal(size=(STATES, ACTIONS)).round(2)
"""Reward of an action in a state, ``[S, A]``."""


class Tabular(gym.Env[Any, Any]):
    """Begins in any state; observations are one-hot; cut after 30 steps."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (STATES,)), spaces.Discrete(ACTIONS)

    def _observe(self) -> NDArray[np.float32]:
        seen = np.zeros(STATES, np.float32)
        if self.state != END:
            seen[self.state] = 1
        return seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.steps = int(self.np_random.integers(STATES)), 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        before, self.steps = self.state, self.steps + 1
        self.state = int(self.np_random.choice(STATES + 1, p=TRANSITIONS[before, action]))
        over = self.state == END
        return self._observe(), REWARDS[before, action], over, not over and self.steps == 30, {}


gym.register("Tabular-v0", entry_point=f"{__name__}:Tabular")


def solve(policy: NDArray[np.float64], transitions: Any = TRANSITIONS, rewards: Any = REWARDS) -> NDArray[np.float64]:
    """Values ``[S]`` of a policy ``[S, A]``: ``(I - gamma P_pi)^-1 r_pi``."""
    following = np.einsum("sa,sat->st", policy, transitions[..., :STATES])
    found: NDArray[np.float64] = np.linalg.solve(np.eye(STATES) - GAMMA * following, (policy * rewards).sum(axis=1))
    return found


def counted(dataset: minari.MinariDataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Transitions ``[S, A, S + 1]`` as they happened in the data, and the first states, ``[n_episodes]``."""
    counts, first = np.zeros((STATES, ACTIONS, STATES + 1)), []
    for episode in dataset.iterate_episodes():
        seen = episode.observations
        states = np.where(seen.any(axis=1), seen.argmax(axis=1), END)
        first.append(states[0])
        np.add.at(counts, (states[:-1], episode.actions, states[1:]), 1)
    assert counts.sum(axis=2).min() > 0
    return counts / counts.sum(axis=2, keepdims=True), np.array(first)


def agent_with(q_values: NDArray[np.float64]) -> DQN:
    """A DQN whose values are a table ``[S, A]``."""
    model = DQN("MlpPolicy", Tabular(), gamma=GAMMA, buffer_size=1, policy_kwargs={"net_arch": []}, device="cpu")
    (layer,) = model.q_net.q_net
    with th.no_grad():
        layer.weight.copy_(th.as_tensor(q_values.T))
        layer.bias.zero_()
    return model
