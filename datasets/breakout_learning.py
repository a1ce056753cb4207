"""
Breakout from random play to the best a PPO reached, in the order it was played: ``atari/breakout/ppo-learning-v0``.

    uv run datasets/breakout_learning.py --steps 400000

A PPO agent (SB3, zoo settings for Atari, a smaller network) learns under the protocol of the DQN Replay Dataset. Below
its own wrappers (a lost life ends the episode, fire on reset, clipped rewards) a recorder keeps a share of the games.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, EpisodicLifeEnv, FireResetEnv
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext.data import Episode, EpisodeRecorder, StackFrames, make_atari_env, write_dataset


class SmallCNN(BaseFeaturesExtractor):
    """The network of Mnih et al. (2013): a third of the cost of SB3's default, and good enough to make data."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=256)
        self.layers = th.nn.Sequential(
            th.nn.Conv2d(observation_space.shape[0], 16, 8, 4), th.nn.ReLU(),
            th.nn.Conv2d(16, 32, 4, 2), th.nn.ReLU(), th.nn.Flatten(),
            th.nn.Linear(2592, 256), th.nn.ReLU(),
        )  # fmt: skip

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Return the features, ``[B, 256]``."""
        return self.layers(observations)


DATASET_ID = "atari/breakout/ppo-learning-v0"


def main() -> None:
    """Train, record, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--keep", type=float, default=0.6, help="share of the games to keep")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--id", default=DATASET_ID)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--agent", type=Path, default=Path("logs/ppo-breakout"))
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    episodes: list[Episode] = []

    def make(number: int) -> gym.Env:
        env: gym.Env = EpisodeRecorder(make_atari_env("Breakout"), episodes, args.keep, seed=1000 * args.seed + number)
        env = ClipRewardEnv(FireResetEnv(EpisodicLifeEnv(Monitor(env))))
        return StackFrames(env, 4)

    env = DummyVecEnv([lambda n=n: make(n) for n in range(8)])
    model = PPO(
        "CnnPolicy", env, n_steps=128, n_epochs=4, batch_size=256, seed=args.seed, verbose=1,
        learning_rate=lambda left: 2.5e-4 * left, clip_range=lambda left: 0.1 * left, vf_coef=0.5, ent_coef=0.01,
        policy_kwargs={"features_extractor_class": SmallCNN, "net_arch": []},
    )  # fmt: skip
    model.policy = model.policy.to(memory_format=th.channels_last)
    checkpoints = CheckpointCallback(save_freq=25_000, save_path=str(args.agent))
    model.learn(args.steps, log_interval=20, callback=checkpoints)
    for number in range(env.num_envs):
        env.envs[number].get_wrapper_attr("flush")()
    steps = sum(len(e.rewards) for e in episodes)
    write_dataset(
        args.id,
        episodes,
        make_atari_env("Breakout"),
        algorithm_name="PPO",
        description=f"{len(episodes)} games ({steps} steps) drawn from {args.steps} steps of a learning PPO, in order. "
        "Sticky actions 0.25, frame skip 4, grey 84x84, unclipped rewards, whole games.",
        ref_min_score=1.7,
        ref_max_score=30.5,
        overwrite=True,
    )


if __name__ == "__main__":
    main()
