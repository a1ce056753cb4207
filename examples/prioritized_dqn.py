"""Prioritized replay in two arguments: 3-step DQN on CartPole, and what the buffer holds afterwards."""

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ext import DQN, PrioritizedReplayBuffer

model = DQN(
    "MlpPolicy",
    "CartPole-v1",
    replay_buffer_class=PrioritizedReplayBuffer,
    replay_buffer_kwargs={"alpha": 0.6, "beta": 0.4},  # beta rises to 1 over the run
    n_steps=3,
    learning_rate=5e-4,
    learning_starts=1_000,
    target_update_interval=250,
    train_freq=1,
    seed=0,
)
model.learn(10_000, progress_bar=True)
print(f"return after 10,000 steps: {evaluate_policy(model, model.get_env(), n_eval_episodes=20)[0]:.0f}")

priorities = model.replay_buffer.priorities.tree.leaves[: model.replay_buffer.size()]
share = np.sort(priorities)[::-1][: len(priorities) // 10].sum() / priorities.sum()
print(f"the most surprising tenth of the transitions is drawn {share:.0%} of the time")
