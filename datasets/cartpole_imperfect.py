"""
Ten episodes of CartPole-v1 by a script that plays like a person: late, in bursts, and sometimes wrong.

    uv run datasets/cartpole_imperfect.py      # cartpole/imperfect-v0

It stands in for a person where none is at hand. To record one: ``sb3x data play CartPole-v1 --id cartpole/human-v0``.
The player sees the pole as it was two steps ago, as a person with a reaction time of 0.15 s does at 15 steps per
second, decides again only every other step, because a key is held for a while, and presses the wrong key now and then.
"""

import argparse

import gymnasium as gym
import numpy as np

from sb3_ext import record


class ImperfectPlayer:
    """
    A player of CartPole with a reaction time.

    :param delay: steps between what is seen and what is done about it
    :param hold: steps for which a key stays down
    :param errors: share of decisions that are wrong
    :param seed: seed of the errors
    """

    def __init__(self, delay: int = 2, hold: int = 2, errors: float = 0.08, seed: int = 0) -> None:
        self.delay, self.hold, self.errors = delay, hold, errors
        self.rng = np.random.default_rng(seed)
        self.seen: list[np.ndarray] = []
        self.key = 0

    def __call__(self, observation: np.ndarray) -> int:
        """Choose the key for this step."""
        if np.abs(observation).max() <= 0.05:  # a new episode
            self.seen = []
        self.seen.append(observation)
        if len(self.seen) % self.hold == 1 % self.hold:
            x, v, angle, turn = self.seen[max(len(self.seen) - 1 - self.delay, 0)]
            self.key = int(angle + 0.5 * turn + 0.03 * x + 0.06 * v > 0)
            if self.rng.random() < self.errors:
                self.key = 1 - self.key
        return self.key


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--id", default="cartpole/imperfect-v0")
    args = parser.parse_args()
    dataset = record(
        ImperfectPlayer(seed=args.seed), gym.make("CartPole-v1"), args.id, n_episodes=args.episodes, seed=args.seed,
        algorithm_name="imperfect player (script)", ref_min_score=22.0, ref_max_score=500.0, overwrite=True,
    )  # fmt: skip
    returns = dataset.storage.metadata["behaviour_return"]
    print(f"{dataset.id}: {dataset.total_episodes} episodes, mean return {returns['mean']:.0f} +- {returns['std']:.0f}")


if __name__ == "__main__":
    main()
