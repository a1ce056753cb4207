"""
Games of the scripted Breakout player as a log in the format of the DQN Replay Dataset, for converting it.

    uv run --extra atari datasets/breakout_log.py --out logs/replay      # logs/replay/Breakout/1/replay_logs
    sb3x data convert-dqn-replay logs/replay --game Breakout --id atari/breakout/log-v0

Any agent can be logged like this: ``ReplayLogger`` sits between the environment's single frames and the agent.
"""

import argparse
from pathlib import Path

import numpy as np
from breakout_scripted import scripted_player

from sb3_ext.data import ReplayLogger, make_atari_env


def main() -> None:
    """Play and log whole games."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--mistakes", type=float, default=0.1, help="share of random moves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=10_000, help="rows per file (the published logs have 1,000,000)")
    parser.add_argument("--out", type=Path, default=Path("logs/replay"))
    args = parser.parse_args()
    env = ReplayLogger(make_atari_env("Breakout"), args.out, "Breakout", capacity=args.rows)
    player = scripted_player(env, args.mistakes, args.seed)
    returns, steps = [], 0
    while steps < args.steps:
        observation, _ = env.reset(seed=args.seed + len(returns))
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(player(observation))
            total, steps, done = total + float(reward), steps + 1, terminated or truncated
        returns.append(total)
    env.close()
    print(f"{env.log.folder}: {len(returns)} games, {steps} steps, mean score {np.mean(returns):.1f}")


if __name__ == "__main__":
    main()
