"""GAIL from ten episodes of a trained PPO, and what a constant reward and cloning reach. A minute on one core."""

import gymnasium as gym
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import GAIL, record

th.set_num_threads(1)  # networks this small gain nothing from more

# an expert, and ten of its episodes; those of a person: sb3x data play Acrobot-v1 --id acrobot/human-v0
settings = {"n_steps": 128, "batch_size": 256, "gae_lambda": 0.95, "learning_rate": 1e-3, "seed": 1, "device": "cpu"}
expert = PPO("MlpPolicy", make_vec_env("Acrobot-v1", 8, seed=1), **settings).learn(60_000)
dataset = record(expert, gym.make("Acrobot-v1"), "examples/acrobot-ppo-v0", n_episodes=10, overwrite=True)
print(f"expert:          {dataset.storage.metadata['behaviour_return']['mean']:.0f} (10 episodes)")


def score(model: GAIL) -> float:
    """Mean return of 50 sampled episodes."""
    return evaluate_policy(model, make_vec_env("Acrobot-v1", 10, seed=99), 50, deterministic=False)[0]


model = GAIL("MlpPolicy", make_vec_env("Acrobot-v1", 8, seed=2), dataset, n_steps=128, seed=2, device="cpu")
print(f"random:          {score(model):.0f}")
model.learn(50_000, progress_bar=True)
print(f"GAIL:            {score(model):.0f}")
model.save("outputs/gail-acrobot")

control = GAIL(
    "MlpPolicy", make_vec_env("Acrobot-v1", 8, seed=2), dataset, n_steps=128, seed=2, device="cpu",
    reward=lambda logits: logits * 0 + 1, absorbing=False, n_disc_updates=0,
).learn(20_000)  # fmt: skip
print(f"constant reward: {score(control):.0f}")

cloned = GAIL("MlpPolicy", make_vec_env("Acrobot-v1", 8, seed=2), dataset, seed=2, device="cpu")
cloned.pretrain(n_epochs=50)
print(f"cloning:         {score(cloned):.0f}")
