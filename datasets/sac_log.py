"""
Episodes of a SAC while it learns, from its first step to its last: a log of mixed quality, with continuous actions.

    uv run --all-extras datasets/sac_log.py                        # pendulum/medium-replay-v0, minutes
    uv run --all-extras datasets/sac_log.py --env Hopper-v5        # mujoco/hopper/medium-replay-v0, half an hour
    uv run --all-extras datasets/sac_log.py --env HalfCheetah-v5   # mujoco/halfcheetah/medium-replay-v0, likewise

A SAC that plays badly at the end learns on for half as many steps. Ctrl-C, or SIGTERM, ends the log where it is, and
what there is gets written. The same seed gives the same log on the same processor and versions. The two of MuJoCo need
``pip install "gymnasium[mujoco]"``.
"""

import argparse
import signal
import time
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ext import SAC
from sb3_ext.data import Episode, EpisodeRecorder, check_new_dataset, write_dataset

MUJOCO = {"learning_starts": 10_000, "train_freq": 2}
"""As rl_zoo3 for MuJoCo, with a gradient step every other step: half the time for as long a log."""
LOGS: dict[str, dict[str, Any]] = {
    # the last tenth of the steps must earn at least "good"
    "Pendulum-v1": {
        "id": "pendulum/medium-replay-v0",
        "steps": 10_000,
        "good": -np.inf,
        "sac": {"learning_rate": 1e-3},
        # 300 episodes of random actions, and rl_zoo3's SAC after 20,000 steps in its benchmark.md
        "scores": {"ref_min_score": -1240.0, "ref_max_score": -157.0},
    },
    # scores of these two: REF_MIN_SCORE and REF_MAX_SCORE of d4rl/infos.py, of older versions of the environments
    "Hopper-v5": {
        "id": "mujoco/hopper/medium-replay-v0",
        "steps": 200_000,
        "good": 1000.0,
        "sac": MUJOCO,
        "scores": {"ref_min_score": -20.272305, "ref_max_score": 3234.3},
    },
    "HalfCheetah-v5": {
        "id": "mujoco/halfcheetah/medium-replay-v0",
        "steps": 200_000,
        "good": 3500.0,
        "sac": MUJOCO,
        "scores": {"ref_min_score": -280.178953, "ref_max_score": 12135.0},
    },
}


class Progress(BaseCallback):
    """Print the mean return of the last ten episodes every so many steps."""

    def __init__(self, episodes: list[Episode], every: int) -> None:
        super().__init__()
        self.episodes, self.every, self.start = episodes, every, time.monotonic()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0 and self.episodes:
            mean = np.mean([e.rewards.sum() for e in self.episodes[-10:]])
            speed = self.num_timesteps / (time.monotonic() - self.start)
            print(
                f"step {self.num_timesteps:,}: {len(self.episodes)} episodes, mean return of the last ten {mean:.1f}, "
                f"{speed:.0f} steps/s",
                flush=True,
            )
        return True


def tenths(episodes: list[Episode]) -> list[float]:
    """Mean return of the episodes that end in each tenth of the steps; NaN where none does."""
    ends = np.cumsum([len(e.rewards) for e in episodes])
    part = np.minimum(ends * 10 // ends[-1], 9)
    returns = np.array([e.rewards.sum() for e in episodes])
    return [float(returns[part == k].mean()) if (part == k).any() else float("nan") for k in range(10)]


def learning_log(env_id: str, steps: int, good: float, seed: int, **sac: Any) -> list[Episode]:
    """Episodes of a SAC from its first step to its last; a last tenth below ``good`` makes that half as many again."""
    episodes: list[Episode] = []
    env = EpisodeRecorder(gym.make(env_id), episodes)
    model = SAC("MlpPolicy", env, seed=seed, device="cpu", **sac)
    progress = Progress(episodes, max(steps // 20, 1))
    try:
        model.learn(steps, callback=progress)
        if episodes and tenths(episodes)[-1] < good:
            print(f"the last tenth earned less than {good}: {steps // 2:,} steps more", flush=True)
            model.learn(steps // 2, callback=progress, reset_num_timesteps=False)
    except KeyboardInterrupt:
        print(f"stopped at step {model.num_timesteps:,}", flush=True)
    env.flush()
    return episodes


def make_dataset(
    env_id: str, dataset_id: str | None = None, seed: int = 7, steps: int | None = None
) -> minari.MinariDataset:
    """Train, log and write one of the datasets above."""
    log = LOGS[env_id]
    env = gym.make(env_id)
    check_new_dataset(dataset_id or log["id"], env)
    episodes = learning_log(env_id, steps or log["steps"], log["good"], seed, **log["sac"])
    total = sum(len(e.rewards) for e in episodes)
    return write_dataset(
        dataset_id or log["id"], episodes, env, algorithm_name="SAC",
        description=f"All episodes of a SAC on {env_id} during its first {total:,} steps, in order. Actions are as "
        "sampled; before learning starts they are uniform.",
        metadata={"seed": seed, "mean_return_of_tenths": tenths(episodes)}, **log["scores"],
    )  # fmt: skip


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=LOGS, default="Pendulum-v1")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, help="default: 10,000 of Pendulum, 200,000 of the others")
    parser.add_argument("--id", help="default: see above")
    args = parser.parse_args()
    th.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.process_time()
    dataset = make_dataset(args.env, args.id, args.seed, args.steps)
    facts = dataset.storage.metadata
    print(
        f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, mean return "
        f"{facts['behaviour_return']['mean']:.2f}, {facts['dataset_size']} MB, {time.process_time() - start:.0f} CPU s"
    )
    print("mean return of each tenth: " + ", ".join(f"{r:.1f}" for r in facts["mean_return_of_tenths"]))


if __name__ == "__main__":
    main()
