"""
Breakout by scripted players of several skills, from random to good: a small mixed log, recorded on all cores.

    uv run --extra atari datasets/breakout_players.py         # atari/breakout/players-v0

The players are those of ``breakout_scripted.py``; each takes an equal part of the steps. Games are cut after 1,000
steps, and the dataset's environment says so: an agent that is evaluated in it plays games that are cut alike.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
from breakout_scripted import scripted_player

from sb3_ext.data import Episode, collect_episodes, make_atari_env, write_dataset

DATASET_ID = "atari/breakout/players-v0"
MAX_STEPS = 1_000


def play(steps: int, mistakes: float, seed: int) -> list[Episode]:
    """Games of one player until there are ``steps`` steps; ``mistakes`` is the share of random moves."""
    env = make_atari_env("Breakout", max_episode_steps=4 * MAX_STEPS)
    return collect_episodes(scripted_player(env, mistakes, seed), env, n_steps=steps, seed=seed)


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--mistakes", type=float, nargs="+", default=[1.0, 0.6, 0.3, 0.1, 0.02])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", default=DATASET_ID)
    args = parser.parse_args()
    seeds = [args.seed + 100_000 * k for k in range(len(args.mistakes))]  # no two players play the same games
    # the games are the same, whatever the number of cores
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(partial(play, args.steps // len(seeds)), args.mistakes, seeds))
    for share, part in zip(args.mistakes, parts, strict=True):
        mean = np.mean([e.rewards.sum() for e in part])
        print(f"{share:.0%} random moves: {len(part)} games, mean return {mean:.1f}")
    shares = ", ".join(f"{share:.0%}" for share in args.mistakes)
    dataset = write_dataset(
        args.id, [e for part in parts for e in part], make_atari_env("Breakout", max_episode_steps=4 * MAX_STEPS),
        algorithm_name="scripted", ref_min_score=1.7, ref_max_score=30.5,
        description=f"Games, cut after {MAX_STEPS} steps, of players that follow the ball by reading the console's RAM "
        f"and move at random {shares} of the time, in equal parts and this order.",
    )  # fmt: skip
    print(f"{args.id}: {dataset.total_episodes} games, {dataset.total_steps} steps")


if __name__ == "__main__":
    main()
