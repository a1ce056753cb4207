"""
Learning curves of GAIL beside two controls and the imitation library's own trainer, from 10 demonstrated episodes.

    uv run --all-extras datasets/ppo_expert.py --env CartPole-v1     # and so on: makes the demonstrations
    uv run --all-extras benchmarks/gail_learning.py --task cartpole --seeds 0 1 2 3 4
    uv run --all-extras benchmarks/gail_learning.py --table

Algorithms: ``gail`` is ours; ``constant`` is the same with a reward of +1 for every step and no discriminator;
``cloning`` is behaviour cloning of the same policy; ``imitation`` is imitation's GAIL with the settings of its
quickstart. Every evaluation plays greedy and sampled actions. A finished run is one JSON file in ``results/learning``
with each episode of each evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import seals
import torch as th
from cql_learning import RESULTS, machine, parse, parse_settings
from imitation.algorithms.adversarial.gail import GAIL as ImitationGAIL
from imitation.rewards.reward_nets import BasicRewardNet
from imitation.util.networks import RunningNorm
from learning_envs import SmallCNN
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext import record
from sb3_ext.data import StackFrames
from sb3_ext.gail import GAIL, load_trajectories

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {"env": "CartPole-v1", "dataset": "cartpole/ppo-v0", "steps": 40_960, "eval_every": 4_096},
    "acrobot": {"env": "Acrobot-v1", "dataset": "acrobot/ppo-v0", "steps": 102_400, "eval_every": 10_240},
    "seals-cartpole": {
        "env": "seals/CartPole-v0", "dataset": "seals-cartpole/ppo-v0", "steps": 153_600, "eval_every": 10_240,
    },
    "cartpole-imperfect": {
        "env": "CartPole-v1", "dataset": "cartpole/imperfect-v0", "steps": 40_960, "eval_every": 4_096,
    },
    "pendulum": {"env": "Pendulum-v1", "dataset": "pendulum/ppo-v0", "steps": 204_800, "eval_every": 20_480},
    "catch": {"env": "Catch-v0", "dataset": "sb3ext/catch/expert-v0", "steps": 61_440, "eval_every": 6_144},
}  # fmt: skip
ALGOS = ("gail", "constant", "cloning", "imitation")
FORMS = {"softplus": "-log(1-D)", "logd": "log(D)", "d": "D", "logit": "logit", "airl": "airl"}
STUDY: dict[str, dict[str, Any]] = {
    **{f"gail-{short}": {"reward": form} for short, form in FORMS.items() if short != "softplus"},
    **{f"gail-{short}-plain": {"reward": form, "absorbing": False} for short, form in FORMS.items()},
}
"""Other reward forms, and all of them without absorbing states."""
OURS: dict[str, Any] = {"n_steps": 128, "learning_rate": "lin_1e-3"}
"""One setting for all tasks: the defaults with eight environments, and PPO's learning rate linear to 0."""
CONSTANT = {"reward": th.ones_like, "absorbing": False, "n_disc_updates": 0}
VISUAL: dict[str, Any] = {
    "policy_kwargs": {"features_extractor_class": SmallCNN, "net_arch": []},
    "reward_net_kwargs": {"features_extractor_class": SmallCNN},
    "disc_batch_size": 64,
    "disc_learning_rate": 3e-4,
    "n_epochs": 4,
}
"""Pictures cost more: smaller networks and batches, and a smaller step for convolutions."""
QUICKSTART = {"batch_size": 64, "ent_coef": 0.0, "learning_rate": 0.0004, "gamma": 0.95, "n_epochs": 5}


def make_env(task: str, seed: int, n_envs: int = 8) -> VecEnv:
    """Environment of a task, monitored; pictures as the agent sees them."""
    wrapper = (lambda env: StackFrames(env, 1)) if task == "catch" else None
    return make_vec_env(TASKS[task]["env"], n_envs, seed=seed, wrapper_class=wrapper)


def make_catch_data(dataset_id: str) -> None:
    """A hundred episodes of nine steps of a perfect player."""
    if dataset_id in minari.list_local_datasets():
        return
    env = gym.make("Catch-v0")
    record(lambda _: 1 + int(np.sign(env.unwrapped.ball - env.unwrapped.paddle)), env, dataset_id, n_episodes=100,
           algorithm_name="perfect player", ref_min_score=-0.7, ref_max_score=1.0)  # fmt: skip


class Curve:
    """Evaluations of a policy on the way."""

    def __init__(self, task: str, label: str) -> None:
        self.env, self.every, self.label = make_env(task, 0, 10), TASKS[task]["eval_every"], label
        self.points: list[dict[str, Any]] = []
        self._started, self.cpu = time.process_time(), 0.0

    def evaluate(self, model: BaseAlgorithm, step: int, episodes: int = 20) -> None:
        """Play greedy and sampled episodes from fixed seeds."""
        self.cpu += time.process_time() - self._started
        point: dict[str, Any] = {"step": step, "cpu_seconds": round(self.cpu, 2)}
        for kind in ("greedy", "sampled"):
            self.env.seed(10_000 + step)
            point[kind] = evaluate_policy(
                model, self.env, episodes, deterministic=kind == "greedy", return_episode_rewards=True
            )[0]
        self.points.append(point)
        print(f"{self.label} {step}: {np.mean(point['greedy']):.1f} {np.mean(point['sampled']):.1f}", flush=True)
        self._started = time.process_time()


class Evaluate(BaseCallback):
    """Evaluate at every ``every`` steps."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve

    def _on_step(self) -> bool:
        if self.num_timesteps % self.curve.every == 0:
            last = self.num_timesteps == self.model._total_timesteps
            self.curve.evaluate(self.model, self.num_timesteps, 100 if last else 20)
        return True


def run(task: str, algo: str, seed: int, overrides: dict[str, Any], results: Path) -> list[dict[str, Any]]:
    """Train one algorithm on one seed; write its result unless settings were overridden."""
    settings = TASKS[task]
    name = f"gail-{task}_{algo}_seed{seed}"
    if (results / f"{name}.json").exists() and not overrides:
        return []
    th.manual_seed(seed)
    np.random.seed(seed)
    env, curve = make_env(task, seed), Curve(task, name)
    policy = "CnnPolicy" if task == "catch" else "MlpPolicy"
    used = {**OURS, **(CONSTANT if algo == "constant" else STUDY.get(algo, {})), **overrides}
    for key, value in used.items():
        if isinstance(value, str) and value.startswith("lin_"):
            used[key] = LinearSchedule(float(value[4:]), 0.0, 1.0)
    if task == "catch":
        used = {**VISUAL, **used}
        make_catch_data(settings["dataset"])
    if algo == "imitation":
        demonstrations = load_trajectories(settings["dataset"], env)
        batch = min(1024, sum(len(t) for t in demonstrations))
        disc = {"demo_batch_size": batch, "gen_replay_buffer_capacity": 512, "n_disc_updates_per_round": 8}
        used = {**QUICKSTART, **disc}
        generator = PPO(policy, env, seed=seed, device="cpu", **QUICKSTART)
        net = BasicRewardNet(env.observation_space, env.action_space, normalize_input_layer=RunningNorm)
        trainer = ImitationGAIL(
            demonstrations=demonstrations, venv=env, gen_algo=generator, reward_net=net, allow_variable_horizon=True,
            **disc,
        )  # fmt: skip
        steps = settings["steps"] // (2048 * 8) * 2048 * 8
        trainer.train(max(steps, 2048 * 8), callback=lambda _: curve.evaluate(generator, generator.num_timesteps, 100))
    else:
        model = GAIL(policy, env, settings["dataset"], seed=seed, device="cpu", **used)
        if algo == "cloning":
            for epochs in (10, 40, 150):
                model.pretrain(epochs)
                curve.evaluate(model, epochs + (curve.points[-1]["step"] if curve.points else 0), 100)
        else:
            model.learn(settings["steps"], callback=Evaluate(curve))
    if overrides:
        return curve.points
    expert = minari.load_dataset(settings["dataset"]).storage.metadata
    facts = {
        "task": f"gail-{task}", "algo": algo, "seed": seed, "settings": {k: str(v) for k, v in used.items()},
        "dataset": {"id": settings["dataset"], "behaviour_return": expert["behaviour_return"],
                    "expert_return": expert["ref_max_score"]},
        "curve": curve.points,
        "command": f"uv run --all-extras benchmarks/gail_learning.py --task {task} --algos {algo} --seeds {seed}",
        **machine(),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(facts))
    return curve.points


def table(results: Path) -> None:
    """Print the last evaluation of each task and algorithm."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gail-*.json"))]
    print("| task | expert | algorithm | seeds | steps | greedy: mean, each seed | sampled: mean | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for task in TASKS:
        for algo in (*ALGOS, *STUDY):
            group = [r for r in runs if r["task"] == f"gail-{task}" and r["algo"] == algo]
            if not group:
                continue
            greedy = [float(np.mean(r["curve"][-1]["greedy"])) for r in group]
            sampled = [float(np.mean(r["curve"][-1]["sampled"])) for r in group]
            expert, steps = group[0]["dataset"]["expert_return"], group[0]["curve"][-1]["step"]
            each, cpu = ", ".join(f"{g:.0f}" for g in greedy), np.median([r["curve"][-1]["cpu_seconds"] for r in group])
            print(
                f"| {task} | {expert:.1f} | {algo} | {len(group)} | {steps:,} | **{np.mean(greedy):.1f}**: {each} | "
                f"{np.mean(sampled):.1f} | {cpu:.0f} |"
            )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algos", nargs="+", choices=[*ALGOS, *STUDY], default=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="trial runs: no result is written")
    args = parse(parser, table)
    th.set_num_threads(1)
    overrides = parse_settings(args.set)
    for seed in args.seeds:
        for algo in args.algos:
            run(args.task, algo, seed, overrides, args.results)


if __name__ == "__main__":
    assert seals
    main()
