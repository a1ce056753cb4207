"""
Choosing between checkpoints without an environment: do offline criteria rank them as their true returns do?

    uv run --all-extras benchmarks/offline_selection.py --task cartpole
    uv run --all-extras benchmarks/offline_selection.py --task pendulum
    uv run --all-extras benchmarks/offline_selection.py --models FOLDER --algo cql --dataset ID --name NAME
    uv run --all-extras benchmarks/offline_selection.py --table

A task trains its checkpoints first: every weight of the conservative term, step count and seed. Other checkpoints are
given as a folder of zip files. Every one is played (the true return), and judged on held-out episodes by the criteria
of ``OfflineEvalCallback``; FQE learns from all data. Models and results are kept, so the command can be given again.
The result is one JSON file in ``results/offline_selection`` with every number of every checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import minari
import numpy as np
import torch as th
from cql_learning import machine  # puts datasets on the path
from ppo_log import LOGS, make_dataset
from scipy.stats import spearmanr
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_ext
from sb3_ext import FQE, OfflineEvalCallback, make_eval_env, split_dataset
from sb3_ext.data import policy_for
from sb3_ext.ope import CRITERIA

RESULTS = Path(__file__).resolve().parent / "results" / "offline_selection"
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "algo": "CQL",
        "dataset": "cartpole/mixed-v0",
        "settings": {"cql_alpha": [0.0, 0.5, 2.0, 20.0]},
        "common": {"learning_rate": 5e-4},
        "steps": [500, 2_000, 6_000],
        "seeds": [0, 1],
    },
    "pendulum": {
        "algo": "ContinuousCQL",
        "dataset": "pendulum/medium-replay-v0",
        "settings": {"cql_alpha": [0.0, 0.5, 2.0, 20.0]},
        "common": {
            "learning_rate": 1e-3,
            "actor_learning_rate": 1e-3,
            "batch_size": 128,
            "cql_n_actions": 4,
            "policy_kwargs": {"net_arch": [64, 64]},
        },
        "steps": [1_000, 4_000, 12_000],
        "seeds": [0, 1],
    },
}
"""What is trained: each combination of settings and seeds, saved at each number of steps."""


def algorithm(name: str) -> Any:
    """The class, by its name or by what ``sb3x --algo`` calls it."""
    return getattr(sb3_ext, {"cql": "CQL", "bc": "BC"}.get(name, name))


def make_data(dataset_id: str) -> None:
    """Make a dataset by its recipe if it is not here."""
    recipes = {log["id"]: env_id for env_id, log in LOGS.items()}
    if dataset_id in recipes and dataset_id not in minari.list_local_datasets():
        make_dataset(recipes[dataset_id])


def train(task: dict[str, Any], data: minari.MinariDataset, folder: Path) -> None:
    """Train and save the checkpoints of a task that are not there."""
    for key, values in task["settings"].items():
        for value in values:
            for seed in task["seeds"]:
                names = {n: folder / f"{key}={value:g}_seed{seed}_{n}.zip" for n in task["steps"]}
                if all(path.exists() for path in names.values()):
                    continue
                model = algorithm(task["algo"])(
                    "MlpPolicy", data, seed=seed, device="cpu", **{key: value}, **task["common"]
                )
                for steps, path in names.items():
                    model.learn(steps - model.num_timesteps, reset_num_timesteps=False, log_interval=None)
                    model.save(path)
                    print(f"saved {path.name}", flush=True)


def judge(path: Path, algo: Any, data: Any, held_out: Any, env: Any, episodes: int, fqe_steps: int) -> dict[str, Any]:
    """True return and every criterion of one checkpoint, and the CPU seconds of each."""
    model, clock = algo.load(path, device="cpu"), [time.process_time()]
    env.seed(12345)
    returns, _ = evaluate_policy(model, env, episodes, deterministic=True, return_episode_rewards=True)
    clock.append(time.process_time())
    callback = OfflineEvalCallback(held_out, verbose=0)
    callback.init_callback(model)
    scores = callback.evaluate()
    clock.append(time.process_time())
    estimator = FQE(policy_for(model.observation_space), data, model, seed=0, device="cpu")
    scores["fqe"] = estimator.learn(fqe_steps, log_interval=None).initial_value().mean
    clock.append(time.process_time())
    seconds = dict(zip(("play", "held_out", "fqe"), np.diff(clock).round(2).tolist(), strict=True))
    return {"checkpoint": path.stem, "returns": [round(float(r), 3) for r in returns], **scores, "cpu_seconds": seconds}


def correlations(found: list[dict[str, Any]]) -> dict[str, float]:
    """
    Spearman's rank correlation of each criterion with the true return, 1 if it ranks perfectly.

    Criteria of which less is better count with the opposite sign.
    """
    true = [np.mean(checkpoint["returns"]) for checkpoint in found]
    signs = {name: 1 if criterion.higher_is_better else -1 for name, criterion in CRITERIA.items()}
    return {
        name: float(spearmanr(true, [sign * checkpoint[name] for checkpoint in found]).statistic)
        for name, sign in signs.items()
        if name in found[0]
    }


def regret(found: list[dict[str, Any]], name: str) -> float:
    """Mean return of the best checkpoint less that of the one that a criterion chooses."""
    sign = 1 if CRITERIA[name].higher_is_better else -1
    true = [float(np.mean(checkpoint["returns"])) for checkpoint in found]
    return max(true) - true[int(np.argmax([sign * checkpoint[name] for checkpoint in found]))]


def table(results: Path) -> None:
    """Print the rank correlations of all results, and what choosing by each criterion loses."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    print(
        "| data | model | checkpoints | returns | criterion | rank correlation | chosen one is worse than the best by |"
    )
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        found = run["checkpoints"]
        true = [np.mean(checkpoint["returns"]) for checkpoint in found]
        for name, rho in sorted(correlations(found).items(), key=lambda item: -item[1]):
            print(
                f"| {run['dataset']} | {run['algo']} | {len(found)} | {min(true):.0f} to {max(true):.0f} | {name} | "
                f"{rho:.2f} | {regret(found, name):.0f} |"
            )


def main() -> None:
    """Train, play, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--models", type=Path, help="folder of checkpoints to judge instead of a task's")
    parser.add_argument("--algo", default="CQL", help="their class")
    parser.add_argument("--dataset", help="id or path of their data")
    parser.add_argument("--name", help="name of the file of results; default: the task's")
    parser.add_argument("--episodes", type=int, default=20, help="to play with each checkpoint")
    parser.add_argument("--fqe-steps", type=int, default=4_000)
    parser.add_argument("--validation", type=float, default=0.1, help="share of held-out episodes")
    parser.add_argument("--work", type=Path, default=Path("logs/offline_selection"), help="where checkpoints are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--import", dest="module", help="module that registers the environment")
    parser.add_argument("--table", action="store_true", help="only print the table of all results")
    args = parser.parse_args()
    if args.table:
        table(args.results)
        return
    if args.task is None and (args.models is None or args.dataset is None or args.name is None):
        parser.error("--task is needed, or --models with --dataset and --name")
    if args.module:
        importlib.import_module(args.module)
    th.set_num_threads(1)
    task = TASKS.get(args.task, {"algo": args.algo, "dataset": args.dataset})
    folder = args.models or args.work / args.task
    make_data(task["dataset"])
    data, held_out = split_dataset(task["dataset"], args.validation)
    if args.models is None:
        train(task, data, folder)
    env = make_eval_env(task["dataset"], n_envs=10)
    result = args.results / f"{args.name or args.task}.json"
    found = json.loads(result.read_text())["checkpoints"] if result.exists() else []
    known = {checkpoint["checkpoint"] for checkpoint in found}
    result.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.zip")):
        if path.stem in known:
            continue
        checkpoint = judge(path, algorithm(task["algo"]), task["dataset"], held_out, env, args.episodes, args.fqe_steps)
        found.append(checkpoint)
        shown = {k: round(v, 3) for k, v in checkpoint.items() if isinstance(v, float)}
        print(path.stem, round(float(np.mean(checkpoint["returns"])), 1), shown, checkpoint["cpu_seconds"], flush=True)
        facts = {"task": args.name or args.task, "algo": task["algo"], "dataset": task["dataset"],
                 "validation": args.validation, "fqe_steps": args.fqe_steps, "settings": task}  # fmt: skip
        result.write_text(json.dumps({**facts, "checkpoints": found, **machine()}))
    for name, rho in sorted(correlations(found).items(), key=lambda item: -item[1]):
        print(f"{name}: rank correlation {rho:.2f}, regret {regret(found, name):.1f}")


if __name__ == "__main__":
    main()
