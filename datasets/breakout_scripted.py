"""
Breakout by a scripted player that follows the ball, with mistakes.

    uv run --extra atari datasets/breakout_scripted.py        # atari/breakout/scripted-v0
    uv run --extra atari datasets/breakout_scripted.py --id atari/breakout/mixed-v0 --steps 250000 \
        --mistakes 1 0.6 0.3 0.1 0.02                         # from random to good

The player reads ball and paddle from the console's RAM and moves under the ball, which no picture-based agent can do; a
share of its moves is random. Several shares take equal parts of the steps, in the order given. 84x84 frames, sticky
actions, unclipped rewards: see ``sb3_ext.data.make_atari_env``.
"""

import argparse
from collections.abc import Callable

import gymnasium as gym
import numpy as np

from sb3_ext.data import Episode, collect_episodes, make_atari_env, write_dataset

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

    return act


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--mistakes", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", default=DATASET_ID)
    args = parser.parse_args()
    env = make_atari_env("Breakout")
    episodes: list[Episode] = []
    for share in args.mistakes:
        player = scripted_player(env, share, args.seed)
        steps = args.steps // len(args.mistakes)
        part = collect_episodes(player, env, n_steps=steps, seed=args.seed + len(episodes))
        print(
            f"{share:.0%} random moves: {len(part)} games, mean return {np.mean([e.rewards.sum() for e in part]):.1f}"
        )
        episodes += part
    shares = ", ".join(f"{share:.0%}" for share in args.mistakes)
    dataset = write_dataset(
        args.id, episodes, env, algorithm_name="scripted", ref_min_score=1.7, ref_max_score=30.5,
        description="Games of a player that follows the ball by reading the console's RAM and moves at random "
        f"{shares} of the time, in equal parts and this order.",
    )  # fmt: skip
    print(f"{args.id}: {dataset.total_episodes} games, {dataset.total_steps} steps")


if __name__ == "__main__":
    main()
