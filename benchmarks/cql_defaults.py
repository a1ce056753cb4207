"""
CQL and behaviour cloning out of the box, on vectors: ours and d3rlpy's, each with nothing but its defaults.

    uv run --all-extras benchmarks/cql_defaults.py            # makes the data, runs what is not there yet
    uv run --all-extras benchmarks/cql_defaults.py --table

Both sides get the same file, the same number of gradient steps, and play the same 40 games greedily. A finished run is
one JSON file in ``results/learning/defaults``. d3rlpy runs in an environment of its own, which uv builds. Our defaults
were chosen by ``cql_defaults_search.py`` on other data sets, ``CHOSEN_ON``; they run here where they are named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
import vector_envs
from cql_learning import machine
from scipy import stats
from speed import blocks
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ext import BC, CQL
from sb3_ext.data import Episode, collect_episodes, write_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))
from cartpole_imperfect import ImperfectPlayer
from ppo_log import learning_log, make_dataset

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "learning" / "defaults"
STEPS = (5_000, 20_000)
GAMES = 40
OURS = {"cql": CQL, "bc": BC}
ALGOS = ("cql", "d3rlpy-cql", "bc", "d3rlpy-bc")

Player = Callable[[np.ndarray], int]
MINATAR = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3, "ent_coef": 0.01}
CLASSIC = {"n_steps": 256, "batch_size": 256, "learning_rate": 1e-3}


def swing(observation: np.ndarray) -> int:
    """MountainCar: push the way the car rolls."""
    return 2 if observation[1] > 0 else 0


def erect(observation: np.ndarray) -> int:
    """Pendulum with five torques: pump energy until the top is near, then hold it there."""
    angle, speed = np.arctan2(observation[1], observation[0]), observation[2]
    missing = 15 - (speed * speed / 2 + 15 * observation[0])
    torque = -10 * angle - 2 * speed if abs(angle) < 0.5 else 2 * np.sign(speed * missing)
    return int(np.clip(np.round(torque + 2), 0, 4))


def planner(env: gym.Env) -> Player:
    """Best player of a table: value iteration over its dynamics."""
    dynamics = env.unwrapped.P
    values = np.zeros(len(dynamics))
    for _ in range(500):
        q = np.array(
            [[sum(p * (r + 0.99 * values[s] * (not end)) for p, s, r, end in moves) for moves in row.values()]
             for row in dynamics.values()]
        )  # fmt: skip
        values = q.max(axis=1)
    best = q.argmax(axis=1)
    return lambda observation: int(best[observation.argmax()])


def expert(env_id: str, seed: int, steps: int) -> Player:
    """A PPO that has learnt, greedy."""
    model = PPO("MlpPolicy", DummyVecEnv([lambda: gym.make(env_id)] * 8), seed=seed, device="cpu", **CLASSIC)
    model.learn(steps)
    return lambda observation: int(model.predict(observation, deterministic=True)[0])


def noisy(env: gym.Env, player: Player, shares: tuple[float, ...], seed: int, steps: int = 10_000) -> list[Episode]:
    """Whole games of at least ``steps`` steps with each share of random moves."""
    rng, episodes = np.random.default_rng(seed), list[Episode]()
    for number, share in enumerate(shares):

        def play(observation: np.ndarray, share: float = share) -> int:
            return int(rng.integers(env.action_space.n)) if rng.random() < share else player(observation)

        episodes += collect_episodes(play, env, n_steps=steps, seed=10_000 * seed + 1_000 * number)
    return episodes


def cartpole_random(env: gym.Env) -> list[Episode]:
    """Nine tenths of the steps at random, one tenth by a player with a reaction time."""
    slow = collect_episodes(ImperfectPlayer(seed=3), env, n_steps=3_000, seed=3_000)
    return collect_episodes(None, env, n_steps=27_000, seed=30_000) + slow


# environment, what it is, recipe
Task = tuple[str, str, Callable[[gym.Env], list[Episode]]]
REPORTED: dict[str, Task] = {
    "cartpole-random": (
        "CartPole-v1", "27,000 random steps and 3,000 of a slow player", cartpole_random,
    ),
    "acrobot-noisy": (
        "Acrobot-v1", "a trained PPO with 10, 50 and 90 % random moves",
        lambda env: noisy(env, expert("Acrobot-v1", 5, 81_920), (0.1, 0.5, 0.9), 5),
    ),
    "spaceinvaders-log": (
        "SpaceInvadersFlat-v0", "two fifths of the games of a learning PPO, 98,304 steps",
        lambda env: learning_log("SpaceInvadersFlat-v0", 98_304, 0.4, 4, **MINATAR),
    ),
    "pendulum-noisy": (
        "PendulumTorques-v0", "a script with 10, 50 and 90 % random moves, five torques",
        lambda env: noisy(env, erect, (0.1, 0.5, 0.9), 6),
    ),
    "taxi-noisy": (
        "TaxiOneHot-v0", "a perfect player with 20, 50 and 90 % random moves",
        lambda env: noisy(env, planner(env), (0.2, 0.5, 0.9), 7),
    ),
}  # fmt: skip
CHOSEN_ON: dict[str, Task] = {
    "cartpole-log": ("CartPole-v1", "all games of a learning PPO, cartpole/mixed-v0", lambda env: []),
    "acrobot-log": (
        "Acrobot-v1", "all games of a learning PPO, 40,960 steps",
        lambda env: learning_log("Acrobot-v1", 40_960, 1.0, 1, **CLASSIC),
    ),
    "mountaincar-noisy": (
        "MountainCar-v0", "a script with 30, 70 and 100 % random moves",
        lambda env: noisy(env, swing, (0.3, 0.7, 1.0), 2),
    ),
    "frozenlake-random": (
        "FrozenLakeOneHot-v0", "20,000 random steps",
        lambda env: collect_episodes(None, env, n_steps=20_000, seed=20_000),
    ),
    "asterix-log": (
        "AsterixFlat-v0", "two fifths of the games of a learning PPO, 98,304 steps",
        lambda env: learning_log("AsterixFlat-v0", 98_304, 0.4, 2, **MINATAR),
    ),
}  # fmt: skip
TASKS = REPORTED | CHOSEN_ON


def make_data(task: str) -> minari.MinariDataset:
    """The task's dataset, made if it is not here."""
    env_id, description, recipe = TASKS[task]
    if task == "cartpole-log":
        found = "cartpole/mixed-v0" in minari.list_local_datasets()
        return minari.load_dataset("cartpole/mixed-v0") if found else make_dataset("CartPole-v1")
    dataset_id = f"defaults/{task}-v0"
    if dataset_id in minari.list_local_datasets():
        return minari.load_dataset(dataset_id)
    env = gym.make(env_id)
    return write_dataset(
        dataset_id, recipe(env), env, algorithm_name="see the description", description=description, data_format="hdf5"
    )


def flat_arrays(dataset: minari.MinariDataset) -> dict[str, Any]:
    """One row for each step, as d3rlpy takes them."""
    episodes = list(dataset.iterate_episodes())
    return {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        **{name: np.concatenate([getattr(e, name) for e in episodes]) for name in ("actions", "rewards")},
        "terminated": np.concatenate([e.terminations for e in episodes]),
        "truncated": np.concatenate([e.truncations for e in episodes]),
        "n_actions": dataset.action_space.n,
    }


def play(act: Callable[[np.ndarray], Any], env_id: str) -> list[float]:
    """Returns of ``GAMES`` games from fixed seeds, all played at once."""
    envs = [gym.make(env_id, disable_env_checker=True) for _ in range(GAMES)]
    observations = np.stack([env.reset(seed=10_000 + n)[0] for n, env in enumerate(envs)])
    returns, playing = np.zeros(GAMES), np.arange(GAMES)
    while len(playing):
        over = []
        for n, action in zip(playing, act(observations[playing]), strict=True):
            observations[n], reward, terminated, truncated, _ = envs[n].step(int(action))
            returns[n] += reward
            over.append(terminated or truncated)
        playing = playing[~np.array(over)]
    return [round(float(r), 4) for r in returns]


def learn(task: str, algo: str, seed: int) -> dict[str, Any]:
    """Train ours and play after each of ``STEPS``."""
    dataset = make_data(task)
    model = OURS[algo]("MlpPolicy", dataset, seed=seed, device="cpu")
    curve, cpu = [], 0.0
    for steps in STEPS:
        started = time.process_time()
        model.learn(steps - model.num_timesteps, reset_num_timesteps=False)
        cpu += time.process_time() - started
        returns = play(lambda x: model.predict(x, deterministic=True)[0], TASKS[task][0])
        curve.append({"step": steps, "cpu_seconds": round(cpu, 2), "returns": returns})
    return {"curve": curve, **machine()}


class Peer:
    """d3rlpy in its own environment, started when it is first needed."""

    def __init__(self) -> None:
        self.process: blocks.Contestant | None = None

    def learn(self, task: str, algo: str, seed: int) -> dict[str, Any]:
        """Train d3rlpy's there, then play its policies here."""
        dataset = make_data(task)
        with tempfile.TemporaryDirectory() as folder:
            if self.process is None:
                command = blocks.peer_command("d3rlpy", script="d3rlpy_defaults.py")
                self.process = blocks.Contestant("d3rlpy", command, 1, Path(tempfile.gettempdir()))
                self.process.wait_ready()
            data = f"{folder}/data.npz"
            np.savez(data, **flat_arrays(dataset))
            job = {"algo": algo.removeprefix("d3rlpy-"), "data": data, "seed": seed, "steps": STEPS, "folder": folder}
            seconds = self.process.ask(json.dumps(job))["cpu_seconds"]
            curve = []
            for steps, cpu in zip(STEPS, seconds, strict=True):
                policy = th.jit.load(f"{folder}/{steps}.pt")
                returns = play(lambda x, policy=policy: policy(th.as_tensor(x)).numpy(), TASKS[task][0])
                curve.append({"step": steps, "cpu_seconds": cpu, "returns": returns})
        return {"curve": curve, **machine(), "peer": self.process.meta}


def run(task: str, algo: str, seed: int, results: Path, peer: Peer) -> None:
    """One run with defaults, unless it is there already."""
    path = results / f"{task}_{algo}_seed{seed}.json"
    if path.exists():
        return
    facts = peer.learn(task, algo, seed) if algo.startswith("d3rlpy") else learn(task, algo, seed)
    data = make_data(task).storage.metadata
    facts["dataset"] = {key: data[key] for key in ("description", "behaviour_return")}
    command = f"uv run --all-extras benchmarks/cql_defaults.py --tasks {task} --algos {algo} --seeds {seed}"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"task": task, "algo": algo, "seed": seed, **facts, "command": command}))
    report(task, algo, seed, facts["curve"])


def report(task: str, algo: str, seed: int, curve: list[dict[str, Any]]) -> None:
    means = ", ".join(f"{p['step']}: {np.mean(p['returns']):.2f} ({p['cpu_seconds']} s)" for p in curve)
    print(f"{task} {algo} seed {seed}: {means}", flush=True)


def interval(values: np.ndarray) -> str:
    """Mean and half the width of its 95 % interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{values.mean():.1f} ± {half:.1f}"


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Ours less theirs with its 95 % interval (Welch)."""
    if ours.std() == theirs.std() == 0:
        return f"{ours.mean() - theirs.mean():+.1f}"
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return f"{ours.mean() - theirs.mean():+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def table(results: Path) -> None:
    """Print means over seeds with 95 % intervals, and gradient steps per CPU second."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    print("| data | its mean | algorithm | steps | ours | d3rlpy | difference | ours, steps/s | d3rlpy, steps/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in TASKS:
        for algo in OURS:
            sides = [[r for r in runs if r["task"] == task and r["algo"] == name] for name in (algo, f"d3rlpy-{algo}")]
            if not all(sides):
                continue
            speeds = [np.median([STEPS[-1] / r["curve"][-1]["cpu_seconds"] for r in side]) for side in sides]
            for place, steps in enumerate(STEPS):
                ours, theirs = (np.array([np.mean(r["curve"][place]["returns"]) for r in side]) for side in sides)
                print(
                    f"| {task} | {sides[0][0]['dataset']['behaviour_return']['mean']:.1f} | {algo} | {steps} | "
                    f"{interval(ours)} | {interval(theirs)} | {difference(ours, theirs)} | {speeds[0]:.0f} | "
                    f"{speeds[1]:.0f} |"
                )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(REPORTED))
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are written")
    parser.add_argument("--table", action="store_true", help="only print the table of all results")
    args = parser.parse_args()
    if args.table:
        table(args.results)
        return
    th.set_num_threads(1)
    peer = Peer()
    for task in args.tasks:
        for seed in args.seeds:
            for algo in args.algos:
                run(task, algo, seed, args.results, peer)
    if peer.process:
        peer.process.close()


if __name__ == "__main__":
    assert vector_envs
    main()
