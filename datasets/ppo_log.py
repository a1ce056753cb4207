"""
Episodes of a PPO while it learns, from its first step to its last: a log of mixed quality.

    uv run --all-extras datasets/ppo_log.py                           # cartpole/mixed-v0
    uv run --all-extras datasets/ppo_log.py --env MinAtarBreakout-v0  # minatar/breakout/mixed-v0

The same seed gives the same log on the same processor and versions; other processors round differently. The second's
environment is ``MinAtar`` in ``benchmarks/learning_envs.py``; evaluating there needs ``PYTHONPATH=benchmarks``.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext.data import Episode, EpisodeRecorder, write_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from learning_envs import MinAtarCNN

LOGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "id": "cartpole/mixed-v0",
        "steps": 24_576,
        "keep": 1.0,
        "description": "All episodes of a PPO during its first 24,576 steps.",
        "ppo": {"n_steps": 256, "batch_size": 256, "learning_rate": 1e-3},
        "scores": {"ref_min_score": 22.0, "ref_max_score": 500.0},
    },
    "MinAtarBreakout-v0": {
        "id": "minatar/breakout/mixed-v0",
        "steps": 1_000_000,
        "keep": 0.25,
        "description": "A quarter of the episodes of a PPO during its first 1,000,000 steps, in order.",
        "ppo": {
            "n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3, "ent_coef": 0.01,
            "policy_kwargs": {"features_extractor_class": MinAtarCNN, "net_arch": [], "normalize_images": False},
        },
        "scores": {},
    },
}  # fmt: skip


def learning_log(env_id: str, steps: int, keep: float, seed: int, **ppo: Any) -> list[Episode]:
    """Episodes of a PPO from its first step to its last; ``keep`` is the share of them that is kept."""
    episodes: list[Episode] = []
    env = DummyVecEnv(
        [lambda n=n: EpisodeRecorder(gym.make(env_id), episodes, keep, seed=1000 * seed + n) for n in range(8)]
    )
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **ppo)
    model.learn(steps)
    for recorder in env.envs:
        recorder.get_wrapper_attr("flush")()
    return [e for e in episodes if len(e.rewards) > 1]


def make_dataset(env_id: str, dataset_id: str | None = None, seed: int = 7) -> minari.MinariDataset:
    """Train, log and write one of the datasets above."""
    log = LOGS[env_id]
    episodes = learning_log(env_id, log["steps"], log["keep"], seed, **log["ppo"])
    return write_dataset(
        dataset_id or log["id"], episodes, gym.make(env_id), algorithm_name="PPO", description=log["description"],
        data_format="hdf5", metadata={"seed": seed}, **log["scores"],
    )  # fmt: skip


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=LOGS, default="CartPole-v1")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--id", help="default: see above")
    args = parser.parse_args()
    th.set_num_threads(1)
    start = time.process_time()
    dataset = make_dataset(args.env, args.id, args.seed)
    facts = dataset.storage.metadata
    print(
        f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, mean return "
        f"{facts['behaviour_return']['mean']:.2f}, {facts['dataset_size']} MB, {time.process_time() - start:.0f} CPU s"
    )


if __name__ == "__main__":
    main()
