"""
BabyAI's GoToObj by the bot that comes with MiniGrid, from mostly random moves to few.

    uv run --all-extras datasets/babyai_bot.py      # minigrid/BabyAI-GoToObj/noisy-bot-v0

Each observation is a dictionary: the picture of 7x7 cells before the agent, its direction, and its mission in words
("go to the red ball"). The bot reads the whole level, which no agent sees. A share of its moves is random, and after
each it plans again. Half of the random moves are a step forward, the others any move. So a step forward is the
commonest move everywhere, wise or not. Several shares take equal parts of the steps, in the order given. A return above
0 is a success.
"""

import argparse
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401  (registers its environments)
import numpy as np
from minigrid.utils.baby_ai_bot import BabyAIBot

from sb3_ext.data import Episode, check_new_dataset, collect_episodes, write_dataset

FORWARD = 0.5
"""Share of the random moves that are a step forward; the others are any move."""


def noisy_bot(env: gym.Env, mistakes: float, seed: int) -> Callable[[dict[str, Any]], int]:
    """Solve the level; ``mistakes`` is the share of random moves."""
    rng, level = np.random.default_rng(seed), env.unwrapped
    bot, taken = None, None

    def act(observation: dict[str, Any]) -> int:
        nonlocal bot, taken
        if level.step_count == 0:  # a new episode
            bot, taken = BabyAIBot(level), None
        taken = int(bot.replan(taken))
        if rng.random() < mistakes:
            taken = int(level.actions.forward) if rng.random() < FORWARD else int(rng.integers(level.action_space.n))
        return taken

    return act


def success_rate(episodes: list[Episode]) -> float:
    """Share of the episodes that reach their goal."""
    return float(np.mean([e.rewards.sum() > 0 for e in episodes]))


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=45_000)
    parser.add_argument("--mistakes", type=float, nargs="+", default=[1.0, 0.95, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", default="minigrid/BabyAI-GoToObj/noisy-bot-v0")
    args = parser.parse_args()
    env = gym.make("BabyAI-GoToObj-v0")
    check_new_dataset(args.id, env, overwrite=True)
    episodes: list[Episode] = []
    for share in args.mistakes:
        bot = noisy_bot(env, share, args.seed)
        part = collect_episodes(bot, env, n_steps=args.steps // len(args.mistakes), seed=args.seed + len(episodes))
        print(f"{share:.0%} random moves: {len(part)} episodes, {success_rate(part):.1%} successful")
        episodes += part
    shares = ", ".join(f"{share:.0%}" for share in args.mistakes)
    dataset = write_dataset(
        args.id, episodes, env, algorithm_name="BabyAIBot with random moves", overwrite=True,
        ref_min_score=0.14, ref_max_score=0.93,  # 300 episodes of random moves, and of the bot without any
        description="Episodes of BabyAI-GoToObj-v0 by MiniGrid's bot, which reads the whole level and moves at random "
        f"{shares} of the time, in equal parts and this order. Half of its random moves are a step forward, the others "
        "any move. A return above 0 is a success.",
        metadata={"success_rate": success_rate(episodes)},
    )  # fmt: skip
    print(
        f"{args.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, "
        f"{success_rate(episodes):.1%} successful"
    )


if __name__ == "__main__":
    main()
