"""
DQN with prioritized replay against DQN with uniform replay, everything else equal.

    uv run --all-extras benchmarks/per_learning.py --task mountaincar          # 5 seeds each
    uv run --all-extras benchmarks/per_learning.py --task cartpole
    uv run --all-extras benchmarks/per_learning.py --task breakout --seeds 0 1 2   # 200,000 steps of ALE/Breakout-v5
    uv run --all-extras benchmarks/per_learning.py --table

Settings are those of rl_zoo3 for DQN (on Breakout a smaller network and a shorter warm-up for the shorter run);
priorities have the paper's alpha 0.6 and beta 0.4 to 1. Nothing was tuned. A run's score is the mean return over all
its evaluations (the area under the curve); the table gives the interquartile mean over seeds with a 95 % bootstrap
interval, and the same of the last evaluation. Every finished run is a JSON file in ``results/learning`` with each
episode of each evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from cql_learning import RESULTS, Curve, machine, parse, plain
from learning_envs import SmallCNN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext import DQN, PrioritizedReplayBuffer
from sb3_ext.data import StackFrames, make_atari_env

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "env": "CartPole-v1",
        "steps": 50_000,
        "eval_every": 2_560,
        "settings": {
            "learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99,
            "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]},
        },
    },
    "mountaincar": {
        "env": "MountainCar-v0",
        "steps": 120_000,
        "eval_every": 6_000,
        "settings": {
            "learning_rate": 4e-3, "batch_size": 128, "buffer_size": 10_000, "learning_starts": 1000, "gamma": 0.98,
            "target_update_interval": 600, "train_freq": 16, "gradient_steps": 8, "exploration_fraction": 0.2,
            "exploration_final_eps": 0.07, "policy_kwargs": {"net_arch": [256, 256]},
        },
    },
    "breakout": {
        "env": "ALE/Breakout-v5",
        "policy": "CnnPolicy",
        "steps": 200_000,
        "eval_every": 20_000,
        "episodes": 10,
        "settings": {
            "learning_rate": 1e-4, "batch_size": 32, "buffer_size": 100_000, "learning_starts": 10_000,
            "target_update_interval": 1000, "train_freq": 4, "gradient_steps": 1, "exploration_fraction": 0.25,
            "exploration_final_eps": 0.01, "optimize_memory_usage": True,
            "policy_kwargs": {"features_extractor_class": SmallCNN, "net_arch": []},
        },
    },
}  # fmt: skip
REPLAY: dict[str, dict[str, Any]] = {
    "uniform": {},
    "prioritized": {
        "replay_buffer_class": PrioritizedReplayBuffer,
        "replay_buffer_kwargs": {"alpha": 0.6, "beta": 0.4},
    },
}


def make_env(env_id: str, n_envs: int, seed: int, training: bool) -> VecEnv:
    """Environment of a task."""
    if env_id == "ALE/Breakout-v5":
        return make_breakout(n_envs, seed, training)
    return make_vec_env(env_id, n_envs, seed=seed)


def make_breakout(n_envs: int, seed: int, training: bool) -> VecEnv:
    """Breakout, four frames: with clipped rewards for training, cut at 1,000 steps for evaluation."""

    def make() -> gym.Env:
        env = make_atari_env("Breakout")
        if training:
            return StackFrames(gym.wrappers.ClipReward(Monitor(env), -1, 1), 4)
        return StackFrames(Monitor(gym.wrappers.TimeLimit(env, 1000)), 4)

    env = DummyVecEnv([make] * n_envs)
    env.seed(seed)
    return env


def run(task: str, replay: str, seed: int, work: Path, results: Path) -> None:
    """Train once and write the curve, unless it is there."""
    name = f"{task}_dqn-{replay}_seed{seed}"
    out, state = results / f"{name}.json", work / name
    if out.exists():
        return
    state.mkdir(parents=True, exist_ok=True)
    settings, curve = TASKS[task], list[dict[str, Any]]()
    kwargs = {**settings["settings"], **REPLAY[replay]}
    if kwargs.get("optimize_memory_usage") and replay == "uniform":  # SB3's buffer cannot do both
        kwargs["replay_buffer_kwargs"] = {"handle_timeout_termination": False}
    env = make_env(settings["env"], 1, seed, training=True)
    model = DQN(settings.get("policy", "MlpPolicy"), env, seed=seed, device="cpu", **kwargs)
    evaluation = make_env(settings["env"], 10, seed, training=False)
    model.learn(
        settings["steps"],
        callback=Curve(evaluation, settings["eval_every"], settings.get("episodes", 20), state, curve),
    )
    facts = {
        "task": task, "algo": f"dqn-{replay}", "seed": seed, "curve": curve,
        "settings": plain(settings["settings"]),
        "replay_buffer_kwargs": REPLAY[replay].get("replay_buffer_kwargs"),
        "command": f"uv run --all-extras benchmarks/per_learning.py --task {task} --seeds {seed}",
        **machine(),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts))


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the lowest and the highest quarter (rounded down) are left out."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def with_interval(scores: list[float]) -> str:
    """Interquartile mean and its 95 % bootstrap interval over seeds."""
    array = np.array(scores)
    drawn = iqm(np.random.default_rng(0).choice(array, (10_000, len(array))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{iqm(array):.1f} ({low:.1f} to {high:.1f})"


def table(results: Path) -> None:
    """Print what there is."""
    print("| task | replay | seeds | mean return over the run, IQM (95 % CI) | last evaluation, IQM (95 % CI) |")
    print("|---|---|---|---|---|")
    for task in TASKS:
        for replay in REPLAY:
            runs = [json.loads(path.read_text()) for path in sorted(results.glob(f"{task}_dqn-{replay}_seed*.json"))]
            if runs:
                means = [[float(np.mean(point["returns"])) for point in r["curve"]] for r in runs]
                area, last = [float(np.mean(m)) for m in means], [m[-1] for m in means]
                print(f"| {task} | {replay} | {len(runs)} | {with_interval(area)} | {with_interval(last)} |")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--replay", nargs="+", choices=REPLAY, default=list(REPLAY))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path("logs/learning"), help="where models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are written")
    args = parse(parser, table)
    th.set_num_threads(1)
    for seed in args.seeds:
        for replay in args.replay:
            run(args.task, replay, seed, args.work, args.results)


if __name__ == "__main__":
    main()
