"""
Learning curves of CQL, offline QR-DQN (``cql_alpha=0``) and behaviour cloning from the same data.

    uv run --all-extras benchmarks/cql_learning.py --task cartpole --seeds 0 1 2
    uv run --all-extras benchmarks/cql_learning.py --task minatar --seeds 0 1 2
    uv run --all-extras benchmarks/cql_learning.py --task catch-random --seeds 0 1 2
    uv run --all-extras benchmarks/cql_learning.py --task catch-narrow --seeds 0 1 2
    uv run --all-extras benchmarks/cql_learning.py --task babyai --seeds 0 1 2
    uv run --all-extras benchmarks/cql_learning.py --task breakout --algos cql --seeds 0      # hours
    uv run --all-extras benchmarks/cql_learning.py --table

Each run is resumable: it saves itself at every evaluation and goes on from there when the command is given again. A
finished run is one JSON file in ``results/learning`` with the whole curve (every evaluation episode), versions and
hardware. The data of a task is the same for all algorithms and seeds; the seed sets networks, batches and evaluation.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import learning_envs
import minari
import numpy as np
import stable_baselines3 as sb3
import torch as th
from learning_envs import MinAtarCNN, SmallCNN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import LinearSchedule

from sb3_ext import BC, CQL, make_eval_env
from sb3_ext.data import collect_episodes, write_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))
from ppo_log import LOGS, make_dataset

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "learning"

ADAM = {"eps": 1e-8, "fused": True}
ATARI_ADAM = {"eps": 0.01 / 64, "fused": True}
"""QR-DQN's for batches of 64."""

MINATAR_POLICY = {
    "features_extractor_class": MinAtarCNN,
    "net_arch": [],
    "n_quantiles": 50,
    "normalize_images": False,
    "optimizer_kwargs": ATARI_ADAM,
}

CATCH = {
    "policy": "CnnPolicy",
    "steps": 8_000,
    "eval_every": 1_000,
    "eval_episodes": 200,
    "common": {"learning_rate": 1e-4, "bf16": True},
    "cql": {"target_update_interval": 500, "cql_alpha": 4.0},
}

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "dataset": "cartpole/mixed-v0",
        "policy": "MlpPolicy",
        "steps": 20_000,
        "eval_every": 2_000,
        "eval_episodes": 50,
        "common": {
            "learning_rate": 1e-4,
            "policy_kwargs": {"net_arch": [128, 128], "n_quantiles": 50, "optimizer_kwargs": ATARI_ADAM},
            "batch_size": 64,
        },
        "cql": {"target_update_interval": 500, "cql_alpha": 1.0, "double_q": False},
    },
    "minatar": {
        "dataset": "minatar/breakout/mixed-v0",
        "policy": "MlpPolicy",
        "steps": 40_000,
        "eval_every": 10_000,
        "eval_episodes": 100,
        "common": {"learning_rate": 3e-4, "policy_kwargs": MINATAR_POLICY, "batch_size": 64},
        "cql": {"target_update_interval": 1000, "cql_alpha": 5.0, "double_q": False},
    },
    "catch-random": {"dataset": "sb3ext/catch/random-v0", **CATCH},
    "catch-narrow": {"dataset": "sb3ext/catch/narrow-v0", **CATCH},
    "babyai": {
        "dataset": "minigrid/BabyAI-GoToObj/noisy-bot-v0",
        "policy": "MultiInputPolicy",
        "steps": 9_000,
        "eval_every": 3_000,
        "eval_episodes": 200,
        "success": True,
        "common": {
            "learning_rate": LinearSchedule(5e-4, 0.0, 1.0),
            "policy_kwargs": {"net_arch": [128, 128], "n_quantiles": 10, "optimizer_kwargs": ADAM},
            "batch_size": 64,
            # there is one thing to go to, so the mission says nothing new
            "dataset_kwargs": {"transforms": ["drop:mission", "one_hot:11,6,3@image", "reward_scale:10"]},
        },
        "cql": {"target_update_interval": 200, "gamma": 0.9, "cql_alpha": 0.3, "exploration_final_eps": 0.1},
    },
    "breakout": {
        "dataset": "atari/breakout/mixed-v0",
        "policy": "CnnPolicy",
        "steps": 150_000,
        "eval_every": 15_000,
        "eval_episodes": 20,
        "eval_kwargs": {
            "max_episode_steps": 12_000
        },  # 3,000 agent steps: a greedy policy that never fires stands still
        # not the paper's (those are in cql.yml): it has learnt nothing after 150,000 steps, see docs/log.md
        "common": {
            "learning_rate": 3e-4,
            "bf16": True,
            "policy_kwargs": {
                "features_extractor_class": SmallCNN,
                "net_arch": [],
                "n_quantiles": 50,
                "optimizer_kwargs": ADAM,
            },
        },
        "cql": {"target_update_interval": 500, "cql_alpha": 50.0, "clip_rewards": True},
    },
}
ALGOS = ("cql", "qrdqn", "bc")


def make_data(task: str) -> None:
    """Make the dataset of a task if it is not here, by its recipe in datasets/ if it has one."""
    dataset_id = TASKS[task]["dataset"]
    if dataset_id in minari.list_local_datasets():
        return
    recipes = {log["id"]: env_id for env_id, log in LOGS.items()}
    if dataset_id in recipes:
        make_dataset(recipes[dataset_id])
    elif task.startswith("catch"):
        env = gym.make("Catch-v0")
        rng = np.random.default_rng(7)
        share = 1.0 if task == "catch-random" else 0.1

        def play(observation: np.ndarray) -> int:
            if rng.random() < share:
                return int(rng.integers(3))
            return 1 + int(np.sign(env.unwrapped.ball - env.unwrapped.paddle))

        write_dataset(
            dataset_id, collect_episodes(play, env, n_episodes=3000, seed=7), env, algorithm_name="scripted",
            description=f"3000 episodes of a perfect player that moves at random {share:.0%} of the time.",
            data_format="hdf5",
        )  # fmt: skip
    else:
        recipe = {"breakout": "the second command at the top of datasets/breakout_scripted.py"}
        sys.exit(f"Make the dataset first: {recipe.get(task, 'datasets/babyai_bot.py')}.")


class LastValues(KVWriter):
    """Logger output that remembers what was written last."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        """Remember."""
        self.values = {k: round(float(v), 4) for k, v in key_values.items() if k.startswith("train/")}

    def close(self) -> None:
        """Nothing is open."""


class Curve(BaseCallback):
    """
    Evaluate, keep every episode's return, save model and curve so that the run can go on later.

    :param success: evaluate greedy and sampled actions, and keep the shares of episodes with a return above 0 as well
    """

    def __init__(
        self, env: Any, every: int, episodes: int, state: Path, curve: list[dict[str, Any]], success: bool = False
    ) -> None:
        super().__init__()
        self.success = success
        self.env, self.every, self.episodes, self.state, self.curve = env, every, episodes, state, curve
        self.last = LastValues()
        self._started = time.process_time()

    def _init_callback(self) -> None:
        self.model.set_logger(Logger(None, [self.last]))

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        cpu = time.process_time() - self._started
        returns = self._evaluate(deterministic=True)
        point = {"step": self.num_timesteps, "returns": returns, "cpu_seconds": round(cpu, 1), **self.last.values}
        if self.success:
            sampled = self._evaluate(deterministic=False)
            point |= {"success": share_above_0(returns)}
            point |= {"sampled_returns": sampled, "sampled_success": share_above_0(sampled)}
        self.curve.append(point)
        shares = [f"{key} {point[key]:.3f}" for key in ("success", "sampled_success") if key in point]
        print(f"{self.state.name} {self.num_timesteps}:", f"{np.mean(returns):.2f}", *shares, flush=True)
        self.model.save(self.state / "model")
        (self.state / "curve.json").write_text(json.dumps(self.curve))
        self._started = time.process_time()
        return True

    def _evaluate(self, deterministic: bool) -> list[float]:
        self.env.seed(10_000 + self.num_timesteps)
        returns, _ = evaluate_policy(
            self.model, self.env, self.episodes, deterministic=deterministic, return_episode_rewards=True
        )
        return returns


def share_above_0(returns: list[float]) -> float:
    """Share of the episodes that reached their goal, where only that is rewarded."""
    return float(np.mean(np.array(returns) > 0))


def run(
    task: str, algo: str, seed: int, work: Path, steps: int | None, overrides: dict[str, Any], results: Path
) -> None:
    """Train one algorithm on one seed, or go on with it; write its result."""
    settings = TASKS[task]
    name = f"{task}_{algo}_seed{seed}"
    result = results / f"{name}.json"
    if result.exists() and not overrides:
        return
    state = work / name
    state.mkdir(parents=True, exist_ok=True)
    dataset, total = settings["dataset"], steps or settings["steps"]
    kwargs = {**settings["common"], **({} if algo == "bc" else settings["cql"]), **overrides}
    if algo == "qrdqn":
        kwargs["cql_alpha"] = 0.0
    if algo == "bc":  # its policy is PPO's, with logits instead of quantiles, and its optimizer the default
        given, others = kwargs.get("policy_kwargs", {}), ("n_quantiles", "optimizer_kwargs")
        kwargs["policy_kwargs"] = {key: value for key, value in given.items() if key not in others}
    curve: list[dict[str, Any]] = []
    kind = BC if algo == "bc" else CQL
    if (state / "model.zip").exists():
        model = kind.load(state / "model", device="cpu")
        model.set_dataset(dataset)
        curve = json.loads((state / "curve.json").read_text())
    else:
        model = kind(settings["policy"], dataset, seed=seed, device="auto", **kwargs)
    transforms = model.dataset_info["transforms"]
    env = make_eval_env(dataset, n_envs=10, seed=seed, transforms=transforms, **settings.get("eval_kwargs", {}))
    success = settings.get("success", False)
    callback = Curve(env, settings["eval_every"], settings["eval_episodes"], state, curve, success)
    left = total - model.num_timesteps
    if left > 0:
        model.learn(left, callback=callback, reset_num_timesteps=False, log_interval=settings["eval_every"] // 2)
    if overrides:
        return
    results.mkdir(parents=True, exist_ok=True)
    facts = {
        "task": task, "algo": algo, "seed": seed, "settings": plain({"policy_kwargs": {}, **kwargs}),
        "dataset": model.dataset_info, "curve": curve,
        "command": f"uv run --all-extras benchmarks/cql_learning.py --task {task} --algos {algo} --seeds {seed}",
        **machine(str(model.device)),
    }  # fmt: skip
    result.write_text(json.dumps(facts))


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a file of results, classes and schedules by their names."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=lambda c: getattr(c, "__name__", repr(c))))
    return found


def machine(device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Versions and hardware for a file of results."""
    packages = {"torch": th, "stable_baselines3": sb3, "gymnasium": gym, "minari": minari}
    return {
        "versions": {name: m.__version__ for name, m in packages.items()} | {"python": platform.python_version()},
        "hardware": {"cpu": cpu_name(), "threads": th.get_num_threads(), "device": device},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(results: Path) -> None:
    """Print the mean over seeds of the last evaluation, and of the best one."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    print(
        "| task | behaviour | algorithm | seeds | steps | last, mean over seeds | each seed | best evaluation, mean |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in TASKS:
        for algo in ALGOS:
            group = [r for r in runs if r.get("task") == task and r["algo"] == algo]
            if not group:
                continue
            last = [float(np.mean(r["curve"][-1]["returns"])) for r in group]
            best = [max(float(np.mean(p["returns"])) for p in r["curve"]) for r in group]
            behaviour = group[0]["dataset"]["behaviour_return"]["mean"]
            each = ", ".join(f"{x:.2f}" for x in last)
            print(
                f"| {task} | {behaviour:.2f} | {algo} | {len(group)} | {group[0]['curve'][-1]['step']} | "
                f"**{np.mean(last):.2f}** | {each} | {np.mean(best):.2f} |"
            )
            for key in ("success", "sampled_success"):
                if key in group[0]["curve"][-1]:
                    shares = [r["curve"][-1][key] for r in group]
                    each = ", ".join(f"{x:.3f}" for x in shares)
                    print(f"| {task}, {key} | | {algo} | {len(group)} | | **{np.mean(shares):.3f}** | {each} | |")


def parse(parser: argparse.ArgumentParser, table: Callable[[Path], None]) -> argparse.Namespace:
    """Parse the command line of a learning benchmark; ``--table`` prints its table and ends."""
    parser.add_argument("--table", action="store_true", help="only print the table of all results")
    args = parser.parse_args()
    if args.table:
        table(args.results)
        parser.exit()
    if args.task is None:
        parser.error("--task is needed")
    return args


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Settings of ``--set``."""
    return {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in pairs)}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="stop earlier or later than the task says")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("logs/learning"), help="where unfinished runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are written")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=JSON", help="trial runs: override settings, no result"
    )
    args = parse(parser, table)
    th.set_num_threads(args.threads)
    make_data(args.task)
    overrides = parse_settings(args.set)
    for seed in args.seeds:
        for algo in args.algos:
            run(args.task, algo, seed, args.work, args.steps, overrides, args.results)


if __name__ == "__main__":
    assert learning_envs
    main()
