"""
Learning curves of EfficientZeroV2 over environment steps and CPU seconds.

    uv run --all-extras benchmarks/efficientzero_learning.py --task cartpole --seeds 0 1 2 3 4
    uv run --all-extras benchmarks/efficientzero_learning.py --task pendulum --seeds 0 1 2
    uv run --all-extras benchmarks/efficientzero_learning.py --task minatar --algos efficientzero dqn qrdqn-per ppo
    uv run --all-extras benchmarks/efficientzero_learning.py --task breakout --algos efficientzero dqn qrdqn-per
    uv run --all-extras benchmarks/efficientzero_learning.py --table

Evaluations play greedy actions (search without noise) from fixed seeds and cost no training time. The table says when a
run's evaluation first reached the task's marks, and gives the interquartile mean over seeds, with a 95 % bootstrap
interval, of all evaluations of a run (the area under the curve) and of the last. A finished run is one JSON file in
``results/learning`` with each episode of each evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from cql_learning import RESULTS, Curve, machine, parse, parse_settings, plain
from learning_envs import MinAtarCNN, SmallCNN
from per_learning import make_env, with_interval
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, FireResetEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext import DQN, QRDQN, EfficientZeroV2, PrioritizedReplayBuffer
from sb3_ext.data import StackFrames, make_atari_env

OFF_POLICY = {
    "learning_rate": 2.5e-4, "buffer_size": 100_000, "learning_starts": 1000, "train_freq": 1, "gradient_steps": 1,
    "target_update_interval": 1000, "exploration_fraction": 0.2, "exploration_final_eps": 0.05,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "env": "CartPole-v1", "policy": "MlpPolicy", "steps": 6_000, "eval_every": 250, "episodes": 20,
        "marks": (200, 475), "settings": {},
    },
    "pendulum": {
        "env": "Pendulum-v1", "policy": "MlpPolicy", "steps": 4_000, "eval_every": 500, "episodes": 20,
        "marks": (-300, -200), "settings": {"gamma": 0.98},
    },
    "minatar": {
        "env": "MinAtarBreakout-v0", "policy": "MlpPolicy", "steps": 100_000, "eval_every": 10_000, "episodes": 30,
        "marks": (5, 10),
        "settings": {
            "gamma": 0.99, "learning_rate": LinearSchedule(1e-3, 1e-4, 1.0), "train_freq": 2, "gradient_steps": 1,
            "learning_starts": 1000, "num_simulations": 8, "max_num_considered_actions": 3,
            "search_value": "improved", "memoize_reanalysis": True,
            "policy_kwargs": {
                "features_extractor_class": MinAtarCNN, "normalize_images": False, "value_range": 20,
                "optimizer_kwargs": {"fused": True},
            },
        },
    },
    "breakout": {
        "env": "ALE/Breakout-v5", "policy": "MlpPolicy", "steps": 24_000, "eval_every": 4_000, "episodes": 20,
        "marks": (3, 6),
        "settings": {
            "gamma": 0.988, "learning_rate": 1e-3, "train_freq": 2, "gradient_steps": 1, "learning_starts": 2000,
            "num_simulations": 8, "search_value": "improved", "ent_coef": 0.05,
            "optimize_memory_usage": True,
            "policy_kwargs": {
                "features_extractor_class": SmallCNN, "value_range": 20, "optimizer_kwargs": {"fused": True},
            },
        },
    },
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "minatar": {"features_extractor_class": MinAtarCNN, "net_arch": [], "normalize_images": False},
    "breakout": {"features_extractor_class": SmallCNN, "net_arch": []},
}
PEERS: dict[str, Any] = {
    "dqn": lambda env, seed, network: DQN(
        "MlpPolicy", env, seed=seed, device="cpu", **OFF_POLICY, policy_kwargs=network
    ),
    "qrdqn-per": lambda env, seed, network: QRDQN(
        "MlpPolicy", env, seed=seed, device="cpu", replay_buffer_class=PrioritizedReplayBuffer, **OFF_POLICY,
        policy_kwargs={**network, "n_quantiles": 50},
    ),
    "ppo": lambda env, seed, network: PPO(
        "MlpPolicy", env, seed=seed, device="cpu", n_steps=128, batch_size=256, n_epochs=4, learning_rate=1e-3,
        ent_coef=0.01, policy_kwargs=network,
    ),
}  # fmt: skip
"""Peers on pictures; PPO has eight environments, and the settings with which it makes our MinAtar dataset."""
ALGOS = ("efficientzero", *PEERS)


def make_task_env(env_id: str, n_envs: int, seed: int, training: bool) -> VecEnv:
    """Environment of a task; Breakout has sticky actions, and a lost life is an end, as in SB3's ``AtariWrapper``."""
    if env_id != "ALE/Breakout-v5":
        return make_env(env_id, n_envs, seed, training)

    def make() -> gym.Env:
        env: gym.Env = Monitor(gym.wrappers.TimeLimit(make_atari_env("Breakout"), 2000))
        env = FireResetEnv(EpisodicLifeEnv(env))
        return StackFrames(gym.wrappers.ClipReward(env, -1, 1) if training else env, 4)

    env = DummyVecEnv([make] * n_envs)
    env.seed(seed)
    return env


def build(task: str, algo: str, seed: int, overrides: dict[str, Any], device: str) -> BaseAlgorithm:
    """Algorithm and training environment."""
    settings = TASKS[task]
    env = make_task_env(settings["env"], 8 if algo == "ppo" else 1, seed, training=True)
    if algo in PEERS:
        if task not in NETWORKS:
            raise SystemExit(f"Only {' and '.join(NETWORKS)} have peers.")
        model: BaseAlgorithm = PEERS[algo](env, seed, NETWORKS[task])
        return model
    return EfficientZeroV2(settings["policy"], env, seed=seed, device=device, **{**settings["settings"], **overrides})


def run(
    task: str,
    algo: str,
    seed: int,
    steps: int | None,
    overrides: dict[str, Any],
    work: Path,
    results: Path,
    device: str,
) -> None:
    """Train once and write the curve, unless it is there."""
    settings = TASKS[task]
    name = f"{task}_{algo}_seed{seed}"
    out, state = results / f"{name}.json", work / name
    trial = bool(steps or overrides)
    if out.exists() and not trial:
        return
    state.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, Any]] = []
    model = build(task, algo, seed, overrides, device)
    evaluation = make_task_env(settings["env"], 10, seed, training=False)
    model.learn(
        steps or settings["steps"],
        callback=Curve(evaluation, settings["eval_every"], settings["episodes"], state, curve),
    )
    if trial:
        return
    used = plain(settings["settings"]) if algo == "efficientzero" else "PEERS in the script"
    facts = {
        "task": f"ez-{task}", "algo": algo, "seed": seed, "settings": used, "curve": curve,
        "command": "uv run --all-extras benchmarks/efficientzero_learning.py "
        f"--task {task} --algos {algo} --seeds {seed}" + ("" if device == "cpu" else f" --device {device}"),
        **machine(device),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts))


def table(results: Path) -> None:
    """Print what there is."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    print("| task | algorithm | mark | steps to it | CPU seconds to it | run, IQM | last evaluation, IQM | each seed |")
    print("|---|---|---|---|---|---|---|---|")
    for task, settings in TASKS.items():
        for algo in ALGOS:
            group = [r["curve"] for r in runs if r.get("task") == f"ez-{task}" and r["algo"] == algo]
            if not group:
                continue
            means = [[float(np.mean(point["returns"])) for point in curve] for curve in group]
            last = [scores[-1] for scores in means]
            shown = " | ".join(
                (
                    with_interval([float(np.mean(scores)) for scores in means]),
                    with_interval(last),
                    ", ".join(f"{score:.1f}" for score in last),
                )
            )
            for mark in settings["marks"]:
                steps, seconds = zip(*(reached(curve, mark) for curve in group), strict=True)
                each = ", ".join(map(shown_mark, steps))
                print(
                    f"| {task} | {algo} | {mark} | **{shown_mark(np.median(steps))}**: {each} | "
                    f"{shown_mark(np.median(seconds))} | {shown} |"
                )


def shown_mark(value: Any) -> str:
    """Steps or seconds to a mark that some runs never reach."""
    return "never" if value == np.inf else f"{value:,.0f}"


def reached(curve: list[dict[str, Any]], mark: float) -> tuple[float, float]:
    """Step and training seconds of the first evaluation whose mean is at least ``mark``; infinite if none is."""
    seconds = np.cumsum([point["cpu_seconds"] for point in curve])
    for point, spent in zip(curve, seconds, strict=True):
        if np.mean(point["returns"]) >= mark:
            return point["step"], float(spent)
    return np.inf, np.inf


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=["efficientzero"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="trial runs: stop earlier or later")
    parser.add_argument("--work", type=Path, default=Path("logs/learning"), help="where models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are written")
    parser.add_argument("--device", default="cpu", help="of EfficientZeroV2; give --results with it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="trial runs: no result is written")
    args = parse(parser, table)
    th.set_num_threads(1)
    overrides = parse_settings(args.set)
    for seed in args.seeds:
        for algo in args.algos:
            run(args.task, algo, seed, args.steps, overrides, args.work, args.results, args.device)


if __name__ == "__main__":
    main()
