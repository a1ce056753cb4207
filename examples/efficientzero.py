"""EfficientZeroV2 on CartPole: learns in some thousand steps, says what it thinks, and draws its search tree."""

import argparse

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_ext import EfficientZeroV2

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2_500, help="environment steps; about a minute and a half per 2,500")
args = parser.parse_args()

th.set_num_threads(1)  # more only get in each other's way with networks this small
env = Monitor(gym.make("CartPole-v1"))
model = EfficientZeroV2("MlpPolicy", env, seed=0, device="cpu", learning_starts=min(200, args.steps // 2))
model.learn(args.steps, progress_bar=True)
mean, std = evaluate_policy(model, env, n_eval_episodes=10)
print(f"CartPole-v1: {mean:.1f} +- {std:.1f} after {args.steps} steps")

observation, _ = env.reset(seed=0)
explanation = model.explain(observation)
print(explanation)
explanation.draw("tree.png")
print("Drew tree.png")
