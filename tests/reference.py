"""Slow and obvious versions of what the package does fast. Nothing here imports the package."""

from __future__ import annotations

import math
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


def stack_at(frames: list[np.ndarray], t: int, frame_stack: int, padding_type: str) -> np.ndarray:
    """The stack an agent sees at step t of one episode, oldest frame first."""
    parts = []
    for i in range(t - frame_stack + 1, t + 1):
        if i >= 0:
            parts.append(frames[i])
        else:
            parts.append(np.zeros_like(frames[0]) if padding_type == "zero" else frames[0])
    return np.concatenate(parts, axis=0)


def episode_transitions(
    frames: list[np.ndarray],
    actions: Any,
    rewards: Any,
    terminated: bool,
    frame_stack: int = 1,
    n_steps: int = 1,
    gamma: float = 0.99,
    padding_type: str = "zero",
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
                stack_at(frames, t, frame_stack, padding_type),
                int(actions[t]),
                total,
                stack_at(frames, end + 1, frame_stack, padding_type),
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


class Node:
    """A node of the slow search: lists, recursion, one root at a time."""

    def __init__(self, state: Any, reward: float, value: float, logits: list[float]) -> None:
        self.state, self.reward, self.value, self.logits = state, reward, value, logits
        self.children: dict[int, Node] = {}
        self.returns: dict[int, list[float]] = {a: [] for a in range(len(logits))}

    def legal(self) -> list[int]:
        return [a for a, logit in enumerate(self.logits) if logit > -math.inf]

    def priors(self) -> dict[int, float]:
        top = max(self.logits)
        weights = {a: math.exp(self.logits[a] - top) for a in self.legal()}
        return {a: w / sum(weights.values()) for a, w in weights.items()}

    def q(self, a: int) -> float:
        return sum(self.returns[a]) / len(self.returns[a])

    def visits(self) -> int:
        """With the node's own first visit."""
        return 1 + sum(map(len, self.returns.values()))

    def mixed_value(self) -> float:
        prior, tried = self.priors(), [a for a in self.returns if self.returns[a]]
        if not tried:
            return self.value
        mean = sum(prior[a] * self.q(a) for a in tried) / sum(prior[a] for a in tried)
        return (self.value + self.visits() * mean) / (1 + self.visits())

    def completed(self, a: int) -> float:
        return self.q(a) if self.returns[a] else self.mixed_value()


class SlowSearch:
    """Gumbel search of one root, written down from its equations. ``model(state, a) -> (r, v, logits, state)``."""

    def __init__(self, model: Any, gamma: float, c_visit: float, c_scale: float, min_range: float) -> None:
        self.model, self.gamma, self.c_visit, self.c_scale, self.min_range = model, gamma, c_visit, c_scale, min_range
        self.low, self.high = math.inf, -math.inf

    def sigma(self, node: Node, a: int) -> float:
        if self.low > self.high:
            return 0.0
        q = (node.completed(a) - self.low) / max(self.high - self.low, self.min_range)
        most = max(map(len, node.returns.values()))
        return (self.c_visit + most) * self.c_scale * min(max(q, 0.0), 1.0)

    def improved(self, node: Node) -> dict[int, float]:
        scores = {a: node.logits[a] + self.sigma(node, a) for a in node.legal()}
        weights = {a: math.exp(s - max(scores.values())) for a, s in scores.items()}
        return {a: w / sum(weights.values()) for a, w in weights.items()}

    def simulate(self, node: Node, a: int) -> float:
        """The return of taking the action; recursion down to an untried one."""
        if a not in node.children:
            reward, value, logits, state = self.model(node.state, a)
            node.children[a] = Node(state, reward, value, logits)
            below = value
        else:
            child = node.children[a]
            policy = self.improved(child)
            scores = {b: policy[b] - len(child.returns[b]) / (1 + child.visits()) for b in child.legal()}
            below = self.simulate(child, max(scores, key=lambda b: scores[b]))
        found = node.children[a].reward + self.gamma * below
        node.returns[a].append(found)
        self.low, self.high = min(self.low, node.q(a)), max(self.high, node.q(a))
        return found

    def run(self, root: Node, gumbel: list[float], simulations: int, considered: int) -> dict[str, Any]:
        plain = {a: gumbel[a] + root.logits[a] for a in root.legal()}
        survivors = sorted(plain, key=lambda a: -plain[a])[:considered]
        first, found = len(survivors), [root.value]
        end = self.phase(simulations, first, first)
        for n in range(simulations):
            score = {a: plain[a] + self.sigma(root, a) for a in survivors}
            if n >= end:
                survivors = sorted(survivors, key=lambda a: -score[a])[: max(len(survivors) // 2, 2)]
                end = n + self.phase(simulations, first, len(survivors))
            fewest = min(len(root.returns[a]) for a in survivors)
            ready = [a for a in survivors if len(root.returns[a]) == fewest]
            found.append(self.simulate(root, max(ready, key=lambda a: score[a])))
        policy = self.improved(root)
        tried = [a for a in survivors if root.returns[a]]
        return {
            "action": max(tried, key=lambda a: plain[a] + self.sigma(root, a)),
            "policy": [policy.get(a, 0.0) for a in range(len(root.logits))],
            "value": sum(found) / len(found),
            "visits": [len(root.returns[a]) for a in range(len(root.logits))],
            "completed": [root.completed(a) for a in range(len(root.logits))],
        }

    @staticmethod
    def phase(simulations: int, first: int, now: int) -> float:
        return math.inf if now <= 2 else max(math.floor(simulations / (math.log2(first) * now)), 1) * now
