"""CQL from a Minari dataset of your own: record, learn offline, go on online. About a minute on one core."""

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import CQL, make_eval_env, record

rng = np.random.default_rng(0)


def sway(observation: np.ndarray) -> int:
    """Catch the falling pole 30 % of the time, move at random otherwise."""
    return int(observation[2] + 0.5 * observation[3] > 0) if rng.random() < 0.3 else int(rng.integers(2))


dataset = record(sway, gym.make("CartPole-v1"), "examples/cartpole-sway-v0", n_steps=10_000, overwrite=True)
print(f"behaviour: {dataset.storage.metadata['behaviour_return']['mean']:.0f}")

settings = {"learning_rate": 1e-4, "batch_size": 64, "target_update_interval": 500, "cql_alpha": 1.0, "seed": 3}
model = CQL("MlpPolicy", dataset, policy_kwargs={"net_arch": [128, 128], "n_quantiles": 50}, **settings)
model.learn(4_000, progress_bar=True)  # gradient steps
print(f"offline:   {evaluate_policy(model, make_eval_env(dataset), n_eval_episodes=20)[0]:.0f}")

model.learn_online(2_000, env="CartPole-v1", offline_fraction=0.5)  # environment steps
print(f"online:    {evaluate_policy(model, model.get_env(), n_eval_episodes=20)[0]:.0f}")
model.save("outputs/cql-cartpole")
