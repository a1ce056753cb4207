"""
Ten episodes of a trained PPO, as demonstrations for imitation learning.

    uv run --all-extras datasets/ppo_expert.py                          # cartpole/ppo-v0
    uv run --all-extras datasets/ppo_expert.py --env Acrobot-v1         # acrobot/ppo-v0
    uv run --all-extras datasets/ppo_expert.py --env Pendulum-v1        # pendulum/ppo-v0
    uv run --all-extras datasets/ppo_expert.py --env seals/CartPole-v0  # seals-cartpole/ppo-v0, fixed horizon

Trains until the greedy policy reaches the score below over 50 episodes, then records greedy episodes. Each takes a
quarter of a minute to a minute on one core.
"""

import argparse
from contextlib import suppress

import gymnasium as gym
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import record

with suppress(ImportError):
    import seals  # noqa: F401

FAST = {"n_steps": 128, "batch_size": 256, "learning_rate": 1e-3, "gamma": 0.98, "gae_lambda": 0.9}
EXPERTS = {
    # dataset, score to reach, most steps, return of random play, settings
    "CartPole-v1": ("cartpole/ppo-v0", 500, 300_000, 22.0, FAST),
    "Acrobot-v1": ("acrobot/ppo-v0", -83, 500_000, -500.0, {**FAST, "gamma": 0.99, "gae_lambda": 0.95}),
    "Pendulum-v1": ("pendulum/ppo-v0", -170, 500_000, -1200.0, {**FAST, "gamma": 0.9, "gae_lambda": 0.95}),
    "seals/CartPole-v0": ("seals-cartpole/ppo-v0", 500, 300_000, 42.0, FAST),
}


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=EXPERTS, default="CartPole-v1")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--id", help="default: see above")
    args = parser.parse_args()
    dataset_id, target, steps, random_return, settings = EXPERTS[args.env]
    th.set_num_threads(1)
    judge = make_vec_env(args.env, 10, seed=args.seed + 1000)
    stop = EvalCallback(
        judge, StopTrainingOnRewardThreshold(target), n_eval_episodes=50, eval_freq=1024, verbose=0, warn=False
    )
    model = PPO("MlpPolicy", make_vec_env(args.env, 8, seed=args.seed), seed=args.seed, device="cpu", **settings)
    model.learn(steps, callback=stop)
    mean, std = evaluate_policy(model, judge, n_eval_episodes=100)
    print(f"PPO after {model.num_timesteps} steps: {mean:.1f} +- {std:.1f} over 100 episodes")
    dataset = record(
        model, gym.make(args.env), args.id or dataset_id, n_episodes=args.episodes, deterministic=True, seed=args.seed,
        ref_min_score=random_return, ref_max_score=mean, overwrite=True,
    )  # fmt: skip
    print(f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps")


if __name__ == "__main__":
    main()
