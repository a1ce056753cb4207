"""
Breakout by a scripted player that follows the ball, with mistakes: ``atari/breakout/scripted-v0``.

    uv run --extra atari datasets/breakout_scripted.py

The player reads ball and paddle from the console's RAM and moves under the ball, which no picture-based agent can do; a
share of its moves is random. 84x84 frames, sticky actions, unclipped rewards: see ``sb3_ext.data.make_atari_env``.
"""

import argparse
from collections.abc import Callable

import gymnasium as gym
import numpy as np

from sb3_ext import record
from sb3_ext.data import make_atari_env

DATASET_ID = "atari/breakout/scripted-v0"
NOOP, FIRE, RIGHT, LEFT = range(4)
PADDLE_X, BALL_X, BALL_Y = 72, 99, 101


def scripted_player(env: gym.Env, mistakes: float, seed: int) -> Callable[[np.ndarray], int]:
    """Follow the ball; ``mistakes`` is the share of random moves."""
    rng = np.random.default_rng(seed)

    def act(observation: np.ndarray) -> int:
        ram = env.unwrapped.ale.getRAM()
        ball_x, ball_y, paddle_x = int(ram[BALL_X]), int(ram[BALL_Y]), int(ram[PADDLE_X])
        if rng.random() < mistakes:
            return int(rng.integers(4))
        if ball_y == 0:
            return FIRE
        if ball_x > paddle_x + 8:
            return RIGHT
        return LEFT if ball_x < paddle_x + 2 else NOOP

    act.__name__ = "scripted"
    return act


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--mistakes", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", default=DATASET_ID)
    args = parser.parse_args()
    env = make_atari_env("Breakout")
    player = scripted_player(env, args.mistakes, args.seed)
    dataset = record(player, env, args.id, n_steps=args.steps, seed=args.seed, ref_min_score=1.7, ref_max_score=30.5)
    print(f"{args.id}: {dataset.total_episodes} games, {dataset.total_steps} steps")


if __name__ == "__main__":
    main()
