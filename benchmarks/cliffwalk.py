"""
Blind cliffwalk (Schaul et al., 2016, section 3.1 and appendix B.1): how much prioritizing can gain.

    uv run --all-extras benchmarks/cliffwalk.py            # n = 2 .. 16, 10 seeds; about 10 minutes on one core

n states in a row, two actions; the wrong one ends the episode with nothing, n right ones end it with reward 1. The
memory holds every transition of all 2^n action sequences, 2^(n+1) - 2 of them, in random order. Tabular Q-learning,
step 1/4, gamma = 1 - 1/n, Q ~ N(0, 0.1); counted are updates until the mean squared error of Q is below 1e-3. Ours are
proportional (eps 1e-4, alpha 1 and 0.6) and rank-based (alpha 0.7) priorities without importance weights; "uniform"
draws at random; "oracle" makes the update that lowers the error most. The paper prints no numbers, only a figure.

Writes ``results/learning/cliffwalk.json`` with every seed, and the figure ``docs/images/cliffwalk.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np

from sb3_ext.replay.priorities import Priorities

HERE = Path(__file__).resolve().parent
STEP, GOAL, EPS = 0.25, 1e-3, 1e-4
METHODS = {
    "uniform": None,
    "rank-based, alpha 0.7": {"alpha": 0.7, "rank_based": True},
    "proportional, alpha 0.6": {"alpha": 0.6, "eps": EPS},
    "proportional, alpha 1": {"alpha": 1.0, "eps": EPS},
}


class Walk:
    """The task, a memory and a Q table ``[n + 1, 2]``, whose last row is the end."""

    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.gamma = n, 1 - 1 / n
        # state i is reached by one in 2^i of the sequences
        counts = np.repeat(2 ** (n - 1 - np.arange(n)), 2)
        self.memory = rng.permutation(np.repeat(np.arange(2 * n), counts)).tolist()
        self.q = [[*pair] for pair in rng.normal(0, 0.1, (n, 2))] + [[0.0, 0.0]]
        self.goal = [self.gamma ** (n - 1 - state) for state in range(n)]

    def td_error(self, transition: int) -> float:
        """Error of a transition ``2 * state + action``; action 1 is right."""
        state, action = divmod(transition, 2)
        target = self.gamma * max(self.q[state + 1]) if action else 0.0
        if transition == 2 * self.n - 1:
            target = 1.0
        return target - self.q[state][action]

    def squared_error(self, transition: int) -> float:
        """Of one entry of the table."""
        state, action = divmod(transition, 2)
        return (self.q[state][action] - (self.goal[state] if action else 0.0)) ** 2

    def run(self, method: str, seed: int, limit: int) -> int:
        """Number of updates until the error is small, at most ``limit``."""
        arguments = METHODS.get(method)
        rng = np.random.default_rng(seed)
        priorities = None
        if arguments is not None:
            priorities = Priorities(len(self.memory), seed=seed, **arguments)
            priorities.activate_range(0, len(self.memory))
        error, bound = sum(map(self.squared_error, range(2 * self.n))), GOAL * 2 * self.n
        for update in range(1, limit + 1):
            if method == "oracle":
                transition = max(range(2 * self.n), key=self._gain)
            else:
                item = int(priorities.draw(1)[0][0]) if priorities else int(rng.integers(len(self.memory)))
                transition = self.memory[item]
            before, delta = self.squared_error(transition), self.td_error(transition)
            self.q[transition // 2][transition % 2] += STEP * delta
            error += self.squared_error(transition) - before
            if priorities:
                priorities.update([item], [delta])
            if error < bound:
                return update
        return limit

    def _gain(self, transition: int) -> float:
        state, action = divmod(transition, 2)
        before, old = self.squared_error(transition), self.q[state][action]
        self.q[state][action] += STEP * self.td_error(transition)
        gain = before - self.squared_error(transition)
        self.q[state][action] = old
        return gain


def plot(results: dict[str, dict[str, list[int]]], path: Path) -> None:
    """Median updates over the size of the memory, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for method, by_n in results.items():
        sizes = [2 ** (int(n) + 1) - 2 for n in by_n]
        counts = np.array(list(by_n.values()))
        axes.plot(sizes, np.median(counts, axis=1), "o-", ms=3, label=method)
        axes.fill_between(sizes, counts.min(axis=1), counts.max(axis=1), alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="transitions in the memory", ylabel="updates until solved")
    axes.set_title("Blind cliffwalk: median, least and most of 10 seeds", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run, print a table, write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 4, 6, 8, 10, 12, 14, 16])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, default=5_000_000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning" / "cliffwalk.json")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "cliffwalk.png")
    args = parser.parse_args()
    results: dict[str, dict[str, list[int]]] = {method: {} for method in (*METHODS, "oracle")}
    print("| n | " + " | ".join(results) + " | uniform / proportional 1 |\n|" + "---|" * (len(results) + 2))
    for n in args.sizes:
        for method, found in results.items():
            found[str(n)] = [Walk(n, seed).run(method, seed, args.limit) for seed in range(args.seeds)]
        medians = [float(np.median(found[str(n)])) for found in results.values()]
        cells = " | ".join(f"{m:,.0f}" for m in medians)
        print(f"| {n} | {cells} | {medians[0] / medians[3]:.1f} |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"benchmark": "cliffwalk", "seeds": args.seeds, "updates": results, "python": platform.python_version()}
    args.out.write_text(json.dumps({**facts, "numpy": np.__version__}))
    plot(results, args.figure)


if __name__ == "__main__":
    main()
