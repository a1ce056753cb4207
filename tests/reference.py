"""Slow and obvious versions of what the package does fast. Nothing here imports the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Transition(NamedTuple):
    observation: np.ndarray
    action: int
    reward: float
    next_observation: np.ndarray
    done: float
    discount: float


def channel_first(frame: np.ndarray, layout: str) -> np.ndarray:
    """``layout``: "vector" and "chw" are kept, "hw" gets a channel, "hwc" is transposed."""
    if layout == "hw":
        return frame[np.newaxis]
    if layout == "hwc":
        return frame.transpose(2, 0, 1)
    return frame


def stack_at(frames: list[np.ndarray], t: int, frame_stack: int, pad_with_zeros: bool) -> np.ndarray:
    """The stack an agent sees at step t of one episode, oldest frame first."""
    parts = []
    for i in range(t - frame_stack + 1, t + 1):
        if i >= 0:
            parts.append(frames[i])
        else:
            parts.append(np.zeros_like(frames[0]) if pad_with_zeros else frames[0])
    return np.concatenate(parts, axis=0)


def episode_transitions(
    frames: list[np.ndarray],
    actions: Any,
    rewards: Any,
    terminated: bool,
    frame_stack: int = 1,
    n_steps: int = 1,
    gamma: float = 0.99,
    pad_with_zeros: bool = True,
) -> list[Transition]:
    steps = len(rewards)
    out = []
    for t in range(steps):
        total, end = 0.0, t
        for i in range(n_steps):
            if t + i < steps:
                total += gamma**i * float(rewards[t + i])
                end = t + i
        out.append(
            Transition(
                stack_at(frames, t, frame_stack, pad_with_zeros),
                int(actions[t]),
                total,
                stack_at(frames, end + 1, frame_stack, pad_with_zeros),
                1.0 if terminated and end == steps - 1 else 0.0,
                gamma ** (end - t + 1),
            )
        )
    return out


def dataset_transitions(dataset: Any, layout: str, **kwargs: Any) -> list[Transition]:
    """All transitions of a Minari dataset, in order, through Minari's own iterator."""
    out = []
    for episode in dataset.iterate_episodes():
        frames = [channel_first(frame, layout) for frame in episode.observations]
        terminated = bool(episode.terminations[-1])
        out += episode_transitions(frames, episode.actions, episode.rewards, terminated, **kwargs)
    return out


def discounted_returns(rewards: list[list[float]], gamma: float) -> list[float]:
    """Backwards through each episode."""
    out: list[float] = []
    for episode in rewards:
        later, reverse = 0.0, []
        for reward in reversed(episode):
            later = reward + gamma * later
            reverse.append(later)
        out += reversed(reverse)
    return out


def window_rows(row: int, age: int, frame_stack: int, length: int) -> tuple[list[int], list[bool]]:
    """Rows of a stack and of what follows it, and which of them lie before the episode."""
    rows, missing = [], []
    for offset in range(1 - frame_stack, length + 1):
        before = age + offset < 0
        rows.append(row - age if before else row + offset)
        missing.append(before)
    return rows, missing


class ReferencePER:
    """Prioritized replay over a list: linear scans, one item at a time (Schaul et al., 2016)."""

    def __init__(self, alpha: float, beta: float, eps: float) -> None:
        self.alpha, self.beta, self.eps = alpha, beta, eps
        self.priorities: list[float] = []
        self.largest = 1.0

    def add(self) -> None:
        self.priorities.append(self.largest)

    def sample(self, uniforms: Any) -> tuple[list[int], list[float]]:
        """``uniforms``: one number in [0, 1) per sample; stratum i is [i, i + 1) / n of the total."""
        powers = [p**self.alpha for p in self.priorities]
        total, n = sum(powers), len(uniforms)
        indices, weights = [], []
        for i, u in enumerate(uniforms):
            wanted, running, chosen = (i + u) / n * total, 0.0, len(powers) - 1
            for k, power in enumerate(powers):
                running += power
                if wanted < running:
                    chosen = k
                    break
            indices.append(chosen)
            weights.append((len(powers) * powers[chosen] / total) ** -self.beta)
        return indices, [w / max(weights) for w in weights]

    def update(self, indices: Any, td_errors: Any) -> None:
        for index, error in zip(indices, td_errors, strict=True):
            self.priorities[index] = abs(error) + self.eps
            self.largest = max(self.largest, self.priorities[index])
