"""
Learning curves of CQL for continuous actions, behaviour cloning and d3rlpy's CQL, and of fine-tuning with Cal-QL.

    uv run --all-extras benchmarks/continuous_learning.py --task hopper --seeds 0 1 2
    uv run --all-extras benchmarks/continuous_learning.py --task halfcheetah --seeds 0 1 2
    uv run --all-extras benchmarks/continuous_learning.py --task pointmaze --seeds 0 1 2
    uv run --all-extras benchmarks/continuous_learning.py --task pointmaze --algos cql-online calql-online
    uv run --all-extras benchmarks/continuous_learning.py --table

The datasets are found by their ids, in ``MINARI_DATASETS_PATH`` if that is set. All algorithms of a task get the same
file, the same settings and the same number of gradient steps, and play the same episodes in the same environment:
d3rlpy learns in an environment of its own, which uv builds, and its policy plays here. ``cql-online`` and
``calql-online`` learn offline first and then in the environment, from as many old transitions as new ones.

Each run is resumable: it saves itself at every evaluation and goes on from there when the command is given again. Only
the part in the environment begins again. A finished run is one JSON file in ``results/learning`` with the whole curve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium_robotics
import minari
import numpy as np
import torch as th
from cql_learning import RESULTS, Curve, machine, parse, parse_settings, plain, share_above_0
from gymnasium import spaces
from speed import blocks
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext import BC, make_eval_env

# larger steps, fewer actions and smaller networks than the authors': for 20,000 steps instead of a million
CQL_SETTINGS = {
    "learning_rate": 1e-3, "actor_learning_rate": 3e-4, "batch_size": 256, "tau": 0.005, "gamma": 0.99,
    "cql_alpha": 5.0, "cql_n_actions": 4,
}  # fmt: skip
MUJOCO = {
    "policy": "MlpPolicy",
    "net_arch": [128, 128],
    "steps": 20_000,
    "eval_every": 5_000,
    "eval_episodes": 10,
    "cql": CQL_SETTINGS,
    "bc": {"learning_rate": 1e-3, "batch_size": 256},
    "online": {"offline_steps": 10_000, "steps": 50_000, "eval_every": 2_500, "eval_episodes": 10},
}
TASKS: dict[str, dict[str, Any]] = {
    "hopper": {**MUJOCO, "dataset": "mujoco/hopper/medium-replay-v0"},
    "halfcheetah": {**MUJOCO, "dataset": "mujoco/halfcheetah/medium-replay-v0"},
    "pointmaze": {
        **MUJOCO,
        "dataset": "pointmaze/umaze/noisy-waypoints-v0",
        "policy": "MultiInputPolicy",
        "success": True,
        "reward_scale": 20.0,  # at most 1 otherwise, which the conservative term outweighs
        "cql": {**CQL_SETTINGS, "tau": 0.01, "cql_alpha": 1.0},
        "steps": 10_000,
        "eval_every": 2_500,
        "eval_episodes": 50,
    },
}
OFFLINE, ONLINE = ("ccql", "bc", "d3rlpy-cql"), ("cql-online", "calql-online")


class Played:
    """
    d3rlpy's policy as ``evaluate_policy`` takes it: its likeliest actions.

    :param path: TorchScript
    :param space: of the actions; the policy's are in [-1, 1]
    """

    def __init__(self, path: Path, space: spaces.Box) -> None:
        self._policy, self._space = th.jit.load(path), space

    def predict(self, observations: Any, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """Actions for a batch."""
        with th.no_grad():
            actions = self._policy(th.as_tensor(flat(observations))).numpy()
        low, high = self._space.low, self._space.high
        return (low + (actions + 1) / 2 * (high - low)).astype(np.float32), None


def flat(observations: Any) -> np.ndarray:
    """Rows of numbers; the entries of a ``Dict`` in the order of their names, as ``MultiInputPolicy`` has them."""
    if isinstance(observations, dict):
        return np.concatenate([flat(observations[key]) for key in sorted(observations)], axis=1)
    return np.asarray(observations, np.float32).reshape(len(observations), -1)


def without_last(observations: Any) -> Any:
    """All but an episode's final observation."""
    if isinstance(observations, dict):
        return {key: value[:-1] for key, value in observations.items()}
    return observations[:-1]


def export(dataset_id: str, scale: float, path: Path) -> None:
    """Write the dataset as d3rlpy takes it, one row for each step, with actions in [-1, 1] and scaled rewards."""
    dataset = minari.load_dataset(dataset_id)
    episodes = list(dataset.iterate_episodes())
    space = dataset.action_space
    actions = np.concatenate([e.actions for e in episodes])
    np.savez(
        path,
        observations=np.concatenate([flat(without_last(e.observations)) for e in episodes]),
        actions=2 * (actions - space.low) / (space.high - space.low) - 1,
        rewards=scale * np.concatenate([e.rewards for e in episodes]),
        terminated=np.concatenate([e.terminations for e in episodes]),
        truncated=np.concatenate([e.truncations for e in episodes]),
    )


def read_curve(state: Path) -> list[dict[str, Any]]:
    """What a run has evaluated so far."""
    path = state / "curve.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def learn_peer(settings: dict[str, Any], seed: int, state: Path, env: VecEnv) -> dict[str, Any]:
    """Train d3rlpy's in its own process, and play its policies here."""
    curve, data = read_curve(state), state / "data.npz"
    if not data.exists():
        export(settings["dataset"], settings.get("reward_scale", 1.0), data)
    start = curve[-1]["step"] if curve else 0
    steps = [start, *range(start + settings["eval_every"], settings["steps"] + 1, settings["eval_every"])]
    command = blocks.peer_command("d3rlpy", script="d3rlpy_continuous.py")
    process = blocks.Contestant("d3rlpy", command, th.get_num_threads(), state)
    try:
        process.wait_ready()
        job = {"data": str(data.resolve()), "seed": seed, "settings": settings["cql"], "steps": steps}
        job |= {"net_arch": settings["net_arch"], "folder": str(state.resolve()), "threads": th.get_num_threads()}
        for number, step in enumerate(steps[1:]):
            answer = process.read() if number else process.ask(json.dumps(job))
            env.seed(10_000 + step)  # as Curve does
            policy = Played(state / f"{step}.pt", env.action_space)
            returns, _ = evaluate_policy(policy, env, settings["eval_episodes"], return_episode_rewards=True)
            point = {"step": step, "returns": returns, "cpu_seconds": answer["cpu_seconds"]}
            if settings.get("success"):
                point["success"] = share_above_0(returns)
            curve.append(point)
            (state / "curve.json").write_text(json.dumps(curve))
            print(f"{state.name} {step}: {np.mean(returns):.2f}", flush=True)
    finally:
        process.close()
    return {"curve": curve, "peer": process.meta, **machine()}


def learn_ours(algo: str, settings: dict[str, Any], seed: int, state: Path, env: VecEnv) -> dict[str, Any]:
    """Train ours offline, and then in the environment if the algorithm says so."""
    from sb3_ext import ContinuousCQL  # here, so that the peers' side stands alone

    kind = BC if algo == "bc" else ContinuousCQL
    curve, online = read_curve(state), settings["online"] if algo in ONLINE else None
    total = online["offline_steps"] if online else settings["steps"]
    transforms = [f"reward_scale:{settings['reward_scale']:g}"] if "reward_scale" in settings else []
    if (state / "model.zip").exists():
        model = kind.load(state / "model", device="cpu")
        model.set_dataset(settings["dataset"])
    else:
        chosen = dict(settings["bc" if algo == "bc" else "cql"])
        if algo == "calql-online":
            chosen["calibrated"] = True
        chosen["dataset_kwargs"] = {"transforms": transforms}
        nets = {"net_arch": settings["net_arch"]}
        model = kind(settings["policy"], settings["dataset"], seed=seed, device="cpu", policy_kwargs=nets, **chosen)
    success = settings.get("success", False)
    every = min(settings["eval_every"], total)
    callback = Curve(env, every, settings["eval_episodes"], state, curve, success)
    if total > model.num_timesteps:
        left = total - model.num_timesteps
        model.learn(left, callback=callback, reset_num_timesteps=False, log_interval=max(1, every // 2))
    facts = {"curve": curve, "dataset": model.dataset_info, **machine()}
    if online is None:
        return facts
    folder, facts["online_curve"] = state / "online", []
    folder.mkdir(exist_ok=True)
    callback = Curve(env, online["eval_every"], online["eval_episodes"], folder, facts["online_curve"], success)
    playground = make_eval_env(settings["dataset"], n_envs=1, seed=seed, transforms=transforms)
    model.learn_online(online["steps"], playground, callback=callback, offline_fraction=0.5)
    return facts


def run(task: str, algo: str, seed: int, args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """One run, or the rest of it, unless its result is there already."""
    settings = {**TASKS[task], "cql": {**TASKS[task]["cql"], **changes}}
    if args.steps:
        settings["steps"] = args.steps
        settings["eval_every"] = min(settings["eval_every"], args.steps)
    name = f"{task}_{algo}_seed{seed}"
    result = args.results / f"{name}.json"
    if result.exists() and not changes:
        return
    state = args.work / name
    state.mkdir(parents=True, exist_ok=True)
    env = make_eval_env(settings["dataset"], n_envs=10, seed=seed)
    if algo == "d3rlpy-cql":
        facts = learn_peer(settings, seed, state, env)
    else:
        facts = learn_ours(algo, settings, seed, state, env)
    env.close()
    if changes:
        return
    if "dataset" not in facts:
        behaviour = minari.load_dataset(settings["dataset"]).storage.metadata.get("behaviour_return")
        facts["dataset"] = {"id": settings["dataset"], "behaviour_return": behaviour}
    command = f"uv run --all-extras benchmarks/continuous_learning.py --task {task} --algos {algo} --seeds {seed}"
    args.results.mkdir(parents=True, exist_ok=True)
    heading = {"task": task, "algo": algo, "seed": seed, "settings": plain(settings), "command": command}
    result.write_text(json.dumps(heading | facts))


def figures(run: dict[str, Any]) -> list[float]:
    """Success rates, or mean returns, of a run's evaluations, those in the environment last."""
    points = run["curve"] + run.get("online_curve", [])
    return [p.get("success", float(np.mean(p["returns"]))) for p in points]


def table(results: Path) -> None:
    """Print means over seeds: the last evaluation offline and the best; then the part in the environment."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    runs = [r for r in runs if r.get("task") in TASKS]
    groups = {(t, a): [r for r in runs if (r["task"], r["algo"]) == (t, a)] for t in TASKS for a in OFFLINE + ONLINE}
    print("| task | behaviour | algorithm | seeds | steps | last, mean over seeds | each seed | best, mean |")
    print("|---|---|---|---|---|---|---|---|")
    for (task, algo), group in groups.items():
        if group and algo in OFFLINE:
            last = [figures(r)[-1] for r in group]
            behaviour = (group[0]["dataset"].get("behaviour_return") or {}).get("mean", float("nan"))
            print(
                f"| {task} | {behaviour:.2f} | {algo} | {len(group)} | {group[0]['curve'][-1]['step']} | "
                f"**{np.mean(last):.2f}** | {', '.join(f'{x:.2f}' for x in last)} | "
                f"{np.mean([max(figures(r)) for r in group]):.2f} |"
            )
    print("\n| task | algorithm | seeds | offline | worst, first fifth online | mean online | last |")
    print("|---|---|---|---|---|---|---|")
    for (task, algo), group in groups.items():
        if group and algo in ONLINE:
            before = [figures(r)[len(r["curve"]) - 1] for r in group]
            online = np.array([figures(r)[len(r["curve"]) :] for r in group])
            early = online[:, : max(1, online.shape[1] // 5)].min(axis=1)
            values = [np.mean(before), early.mean(), online.mean(), online[:, -1].mean()]
            print(f"| {task} | {algo} | {len(group)} | {' | '.join(f'{v:.2f}' for v in values)} |")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algos", nargs="+", choices=OFFLINE + ONLINE, default=list(OFFLINE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="offline: stop earlier or later than the task says")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("logs/learning"), help="where unfinished runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are written")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=JSON", help="trial runs: override settings of CQL, no result"
    )
    args = parse(parser, table)
    th.set_num_threads(args.threads)
    changes = parse_settings(args.set)
    for seed in args.seeds:
        for algo in args.algos:
            run(args.task, algo, seed, args, changes)


if __name__ == "__main__":
    assert gymnasium_robotics
    main()
