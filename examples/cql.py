"""CQL from a Minari dataset of your own: record, learn offline, go on online."""

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import CQL, make_eval_env, record


def lean(observation):
    """Push the cart to where the pole leans: a simple player, about 40 steps per episode."""
    return int(observation[2] > 0)


dataset = record(lean, gym.make("CartPole-v1"), "examples/cartpole-lean-v0", n_steps=5000, overwrite=True)
print(f"behaviour: {dataset.storage.metadata['behaviour_return']['mean']:.0f}")

small = {"net_arch": [128, 128], "n_quantiles": 50}
model = CQL("MlpPolicy", dataset, learning_rate=1e-4, target_update_interval=500, cql_alpha=1.0, policy_kwargs=small)
model.learn(2000, progress_bar=True)  # gradient steps
print(f"offline:   {evaluate_policy(model, make_eval_env(dataset), n_eval_episodes=20)[0]:.0f}")

model.learn_online(2000, env="CartPole-v1", offline_fraction=0.5)  # environment steps
print(f"online:    {evaluate_policy(model, model.get_env(), n_eval_episodes=20)[0]:.0f}")
model.save("outputs/cql-cartpole")
