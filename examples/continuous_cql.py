"""ContinuousCQL: from random swings of a pendulum to one that stands. Two minutes on one core."""

import argparse

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import ContinuousCQL, make_eval_env, record

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4_000, help="gradient steps offline, and a quarter of them online")
steps = parser.parse_args().steps

dataset = record(None, gym.make("Pendulum-v1"), "examples/pendulum-random-v0", n_steps=20_000, overwrite=True)
print(f"behaviour: {dataset.storage.metadata['behaviour_return']['mean']:.0f}")

settings = {"learning_rate": 1e-3, "actor_learning_rate": 1e-3, "gamma": 0.98, "cql_alpha": 0.5, "cql_n_actions": 4}
model = ContinuousCQL("MlpPolicy", dataset, policy_kwargs={"net_arch": [64, 64]}, seed=0, **settings)
model.learn(steps, progress_bar=True)  # gradient steps
env = make_eval_env(dataset)
print(f"offline:   {evaluate_policy(model, env, n_eval_episodes=20)[0]:.0f}")

model.learn_online(steps // 4, env=env, offline_fraction=0.5)  # environment steps
print(f"online:    {evaluate_policy(model, env, n_eval_episodes=20)[0]:.0f}")
model.save("outputs/continuous-cql-pendulum")
